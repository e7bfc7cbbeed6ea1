from __future__ import annotations

import math

import pytest
import torch

from causalrm_ray.rl.schedule import Schedule, learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(0.75 * math.pi)) / 2]),
    ],
)
def test_factors_by_hand(schedule: Schedule, expected: list[float]) -> None:
    found = [learning_rate_factor(position, 2, 6, schedule) for position in range(len(expected))]
    assert found == pytest.approx(expected, rel=1e-12)


def test_without_warmup_a_constant_schedule_changes_nothing() -> None:
    assert [learning_rate_factor(position, 0, 3, "constant") for position in range(5)] == [1.0] * 5


def test_cosine_equals_torch_s() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for position in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate_factor(position, 0, 10, "cosine"), rel=1e-9)
        optimizer.step()
        scheduler.step()
