"""Do engine and learner compute the same? A checksum says that weights arrived, not what is made of them.

answers under the learner's own weights --> the engine's log-probability of each token, the learner's --> their mean difference
"""

from __future__ import annotations

from collections.abc import Mapping

from causalrm_ray.errors import InputError

# Mean |difference| of log-probabilities, nats per token, from which an engine computes another model: those that compute the same
# differ by 1e-5 in float32, by about 0.01 in bfloat16; experts or a matrix out of place make whole nats.
TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.1}


def check_agreement(gaps: Mapping[str, float], dtype: str, engine: str) -> None:
    """Raise InputError unless each of `gaps`, by what it was found on, is within the TOLERANCE of the `dtype`."""
    for name, gap in gaps.items():
        if not gap <= TOLERANCE[dtype]:  # nan is none, either
            instead = "" if engine == "hf" else ", or take rollout.engine=hf"
            raise InputError(
                f"rollout.engine={engine}: {name} must give the learner's log-probabilities under the same weights, up to "
                f"{TOLERANCE[dtype]} nats per token in {dtype}, got a mean difference of {gap:.2g}: it computes another model, "
                f"whose answers the learner cannot learn from. Choose another model.policy{instead}"
            )
