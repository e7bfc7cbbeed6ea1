"""The gate of reward models, by itself."""

from __future__ import annotations

import pytest

from actors.reward.promotion import GATE_TOLERANCE, judge


@pytest.mark.parametrize(
    ("risk", "serving_risk", "promoted", "reason"),
    [
        (0.9, None, True, "first model, held-out risk 0.9000"),
        (0.5, 0.6, True, "held-out risk 0.5000 <= 0.6100"),
        (0.5 + GATE_TOLERANCE, 0.5, True, "held-out risk 0.5100 <= 0.5100"),
        (0.52, 0.5, False, "held-out risk 0.5200 > 0.5100"),
    ],
)
def test_a_candidate_serves_unless_its_risk_exceeds_the_serving_one_by_the_tolerance(
    risk: float, serving_risk: float | None, promoted: bool, reason: str
) -> None:
    found = judge(risk, serving_risk, version=4)
    assert (found.promoted, found.reason, found.version) == (promoted, reason, 5 if promoted else 4)
