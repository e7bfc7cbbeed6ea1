"""The promotion gate: may a newly fitted reward model serve?

Both models are measured on the same held-out rows, by the observed, corrected risk that neither was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

GATE_TOLERANCE = 0.01  # a candidate serves if its held-out observed risk is at most this above the serving model's


@dataclass(frozen=True)
class Promotion:
    """Whether a candidate serves now, why, and the version that serves."""

    promoted: bool
    reason: str
    version: int


def judge(risk: float, serving_risk: float | None, version: int) -> Promotion:
    """Promote a candidate of held-out `risk` if that is at most `serving_risk` + GATE_TOLERANCE, or if nothing serves (None).

    `version` is the one that serves; a promoted candidate becomes the next.
    """
    if serving_risk is None:
        return Promotion(True, f"first model, held-out risk {risk:.4f}", version + 1)
    limit = serving_risk + GATE_TOLERANCE
    if risk <= limit:
        return Promotion(True, f"held-out risk {risk:.4f} <= {limit:.4f}", version + 1)
    return Promotion(False, f"held-out risk {risk:.4f} > {limit:.4f}", version)
