"""Pointwise losses and their noise-aware surrogate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from causalrm_ray.losses.pointwise import LINEAR, LOSSES, MAX_LOGIT, bce, bounded_bce, mse
from causalrm_ray.losses.surrogate import denoise, surrogate
from causalrm_ray.types import NoiseRates

ALL = {**LOSSES, "bounded_bce": bounded_bce}
RATES = st.tuples(st.floats(0, 0.6), st.floats(0, 0.39)).map(lambda pair: NoiseRates(*pair))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bce_equals_hand_values() -> None:
    loss = bce(double(0.0, math.log(3.0), math.log(3.0)), double(1.0, 1.0, 0.5))
    expected = [math.log(2), math.log(4 / 3), 0.5 * math.log(4 / 3) + 0.5 * math.log(4)]
    torch.testing.assert_close(loss, double(*expected))


def test_mse_equals_hand_values() -> None:
    torch.testing.assert_close(mse(double(0.0, math.log(3.0)), double(1.0, 0.0)), double(0.25, 0.5625))


def test_bounded_bce_is_bce_near_zero_and_has_a_ceiling() -> None:
    small = double(-0.1, 0.1)
    torch.testing.assert_close(bounded_bce(small, double(0.0, 1.0)), bce(small, double(0.0, 1.0)), rtol=1e-4, atol=1e-5)
    assert float(bounded_bce(double(-1e6), double(1.0))) == pytest.approx(math.log1p(math.exp(MAX_LOGIT)))


@given(logit=st.floats(-20, 20), rates=RATES, name=st.sampled_from(sorted(ALL)))
def test_noise_corrected_loss_equals_clean_loss_in_expectation(logit: float, rates: NoiseRates, name: str) -> None:
    s = double(logit)
    at_0, at_1 = surrogate(ALL[name], s, double(0.0), rates), surrogate(ALL[name], s, double(1.0), rates)
    given_1 = (1 - rates.rho_01) * at_1 + rates.rho_01 * at_0
    given_0 = (1 - rates.rho_10) * at_0 + rates.rho_10 * at_1
    torch.testing.assert_close(given_1, ALL[name](s, double(1.0)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(given_0, ALL[name](s, double(0.0)), rtol=1e-8, atol=1e-8)


@given(logit=st.floats(-20, 20), y=st.floats(-9, 9), name=st.sampled_from(["bce", "bounded_bce"]))
def test_a_linear_loss_goes_on_beyond_the_labels(logit: float, y: float, name: str) -> None:
    loss, s = ALL[name], double(logit)
    expected = y * loss(s, double(1.0)) + (1 - y) * loss(s, double(0.0))
    torch.testing.assert_close(LINEAR[loss](s, double(y)), expected, rtol=1e-8, atol=1e-8)


def test_surrogate_is_the_loss_if_noise_free() -> None:
    logit, r = double(-2.0, 0.3, 5.0), double(1.0, 0.0, 1.0)
    torch.testing.assert_close(surrogate(bce, logit, r, NoiseRates(0, 0)), bce(logit, r))


def test_surrogate_distinguishes_the_two_rates() -> None:
    # by hand, at logit 0 under mse both losses are 1/4: [(1 - rho_10) - rho_01] / 4 / (1 - rho_01 - rho_10) = 1/4;
    # at probability 3/4: l(1) = 1/16, l(0) = 9/16, rates (0.2, 0.1): (0.9 / 16 - 0.2 * 9 / 16) / 0.7 = -0.9 / 16 / 0.7
    logit = double(math.log(3.0))
    torch.testing.assert_close(surrogate(mse, logit, double(1.0), NoiseRates(0.2, 0.1)), double(-0.9 / 16 / 0.7))
    torch.testing.assert_close(surrogate(mse, logit, double(0.0), NoiseRates(0.2, 0.1)), double((0.8 * 9 - 0.1) / 16 / 0.7))


def test_bounded_surrogate_has_a_floor_where_the_plain_one_has_none() -> None:
    rates, always_liked = NoiseRates(0.3, 0.3), double(1.0)
    assert float(surrogate(bce, double(1e4), always_liked, rates)) < -1000
    assert float(surrogate(bounded_bce, double(1e4), always_liked, rates)) > -MAX_LOGIT


@given(prob=st.floats(0, 1), rates=RATES)
def test_denoise_inverts_the_noise(prob: float, rates: NoiseRates) -> None:
    noisy = double(prob) * (1 - rates.rho_01) + (1 - double(prob)) * rates.rho_10
    torch.testing.assert_close(denoise(noisy, rates), double(prob), rtol=1e-9, atol=1e-9)


def test_denoise_stays_in_the_unit_interval() -> None:
    torch.testing.assert_close(denoise(double(0.0, 1.0), NoiseRates(0.2, 0.1)), double(0.0, 1.0))


@pytest.mark.parametrize("loss", ALL.values(), ids=list(ALL))
def test_labels_outside_the_unit_interval_are_named(loss) -> None:
    with pytest.raises(ValueError, match=r"y must be in \[0, 1\], got min=0 max=1.5"):
        loss(double(0.0, 0.0), double(0.0, 1.5))
    with pytest.raises(ValueError, match=r"rows must match, got \{'logit': 1, 'y': 2\}"):
        loss(double(0.0), double(0.0, 1.0))


def test_surrogate_refuses_soft_or_missing_labels() -> None:
    for value in (0.5, math.nan):
        with pytest.raises(ValueError, match=f"r must be .*got {value}"):
            surrogate(bce, double(0.0), double(value), NoiseRates(0.1, 0.1))
    with pytest.raises(ValueError, match=r"rho_01 \+ rho_10 must be below 1.*1.1000"):
        NoiseRates(0.6, 0.5)
