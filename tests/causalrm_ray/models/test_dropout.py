"""Dropout: its rate, its scale, its gradient, and its seed."""

from __future__ import annotations

import math

import pytest
import torch

from causalrm_ray.models.kernels import Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_fall_out_at_the_rate_and_the_mean_stays(p: float) -> None:
    x = torch.ones(333, 1001, requires_grad=True)  # not a multiple of eight
    torch.manual_seed(0)
    y = dropout(x, p, training=True)
    rate = round(256 * p) / 256
    error = math.sqrt(rate * (1 - rate) / x.numel())
    assert float((y == 0).float().mean()) == pytest.approx(rate, abs=3 * error)
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - rate)]))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    rows = (y == 0).float().mean(1)  # rows are alike: what falls out does not hang on the place
    assert float(rows.std()) == pytest.approx(math.sqrt(rate * (1 - rate) / 1001), rel=0.15)  # 3.9 standard errors of a sd of 333


def test_a_seed_decides_and_calls_differ() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert not torch.equal(first, second)


def test_nothing_falls_out_outside_training_or_at_rate_zero() -> None:
    x = torch.randn(5, 3)
    assert dropout(x, 0.5, training=False) is x
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x


def test_it_keeps_the_type() -> None:
    assert dropout(torch.ones(9, dtype=torch.bfloat16), 0.25, training=True).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_rate_that_is_none_is_named(p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout must be at least 0 and below 1, got {p}"):
        Dropout(p)
