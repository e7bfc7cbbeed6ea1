"""Warnings about a policy that drifts during a run: reward hacking shows first in answer lengths and entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

WINDOW = 3  # steps whose mean is compared: the first ones with the last ones
ENTROPY_SHARE = 0.3  # of the entropy at the start, below which the policy is close to collapse
LENGTH_DRIFT = 0.5  # relative change of the mean length beyond which the reward model may reward length itself
STOPPED_SHARE = 0.5  # of the steps
LOW_ESS = 0.9  # share of the tokens; where engine and learner agree it is 1, or a little less in bfloat16


def drift_warnings(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Warnings on what has drifted since the run's start, each with values and a remedy; empty if nothing has.

    `rows` are the metrics of its steps in order: `entropy` in nats per token, `response_length` in tokens; a row may lack one.
    Drift needs at least 2 * WINDOW steps.
    """
    sentences = []
    entropy, length = _ends(rows, "entropy"), _ends(rows, "response_length")
    if entropy and entropy[1] < ENTROPY_SHARE * entropy[0]:
        sentences.append(
            f"Entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats per token: the policy hardly varies its answers "
            "and learns little from more steps. Stop earlier, raise learner.kl.coefficient, or lower learner.lr."
        )
    if length and abs(length[1] - length[0]) > LENGTH_DRIFT * length[0]:
        sentences.append(
            f"Answers went from {length[0]:.0f} to {length[1]:.0f} tokens on average: read some: the reward model may reward "
            "length itself. Raise learner.kl.coefficient, or collect feedback on such answers and refit."
        )
    weights = [row["importance_weight_ess"] for row in rows if row.get("staleness") == 0 and "importance_weight_ess" in row]
    if weights and min(weights) < LOW_ESS:
        sentences.append(low_ess(min(weights)))
    stopped = [row["kl_stopped"] for row in rows if "kl_stopped" in row]
    if stopped and fmean(stopped) > STOPPED_SHARE:
        sentences.append(
            f"{fmean(stopped):.0%} of the steps ended early at learner.kl.stop: updates are too large. Lower learner.lr or "
            "learner.epochs."
        )
    return sentences


def low_ess(share: float) -> str:
    """The warning on importance weights of an effective sample size of this `share` of a step's tokens, all written by the newest
    weights."""
    return (
        f"The effective sample size of the importance weights was {share:.0%} of the tokens, though the newest weights wrote "
        "them: engine and learner disagree. Take model.dtype=float32, or rollout.engine=hf."
    )


def _ends(rows: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
    """Mean of the first and of the last WINDOW values; None with fewer than two windows."""
    values = [row[name] for row in rows if name in row]
    return (fmean(values[:WINDOW]), fmean(values[-WINDOW:])) if len(values) >= 2 * WINDOW else None
