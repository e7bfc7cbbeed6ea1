"""Theorems 1 to 3 of arXiv 2603.18736 by enumeration of every outcome of small populations, and identities between estimators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrm_ray.losses import reweighted
from causalrm_ray.losses.pointwise import bce, bounded_bce, mse
from causalrm_ray.losses.surrogate import surrogate
from causalrm_ray.types import NoiseRates

TRUE = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # r* of three impressions
LOGIT = torch.tensor([0.7, -0.4, -1.3], dtype=torch.float64)
PROPENSITY = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
WRONG_PROPENSITY = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
IMPUTATION = torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64)  # wrong
RATES = NoiseRates(0.2, 0.1)


def moments(estimate: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Mean and variance of an estimate over all 64 outcomes (o, r), weighed by their true probabilities."""
    mean = square = total = 0.0
    liked = TRUE * (1 - RATES.rho_01) + (1 - TRUE) * RATES.rho_10
    for bits in itertools.product((0.0, 1.0), repeat=6):
        o, r = torch.tensor(bits, dtype=torch.float64).split(3)
        chance = float((torch.where(o == 1, PROPENSITY, 1 - PROPENSITY) * torch.where(r == 1, liked, 1 - liked)).prod())
        value = float(estimate(o, r).mean())
        mean, square, total = mean + chance * value, square + chance * value**2, total + chance
    assert total == pytest.approx(1.0)
    return mean, square - mean**2


def causalrm_ips(loss, propensity: Tensor, rates: NoiseRates = RATES) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, r: reweighted.ips(surrogate(loss, LOGIT, r, rates), o, propensity)


def causalrm_dr(loss, propensity: Tensor, imputation: Tensor, rates: NoiseRates = RATES) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, r: reweighted.dr(surrogate(loss, LOGIT, r, rates), o, propensity, loss(LOGIT, imputation))


losses = pytest.mark.parametrize("loss", [bce, mse, bounded_bce], ids=lambda loss: loss.__name__)


@losses
def test_ips_is_unbiased_if_propensity_and_rates_right(loss) -> None:
    assert moments(causalrm_ips(loss, PROPENSITY))[0] == pytest.approx(float(loss(LOGIT, TRUE).mean()), abs=1e-12)


@losses
def test_dr_is_unbiased_if_propensity_right_and_imputation_wrong(loss) -> None:
    assert moments(causalrm_dr(loss, PROPENSITY, IMPUTATION))[0] == pytest.approx(float(loss(LOGIT, TRUE).mean()), abs=1e-12)


@losses
def test_dr_is_unbiased_if_imputation_right_and_propensity_wrong(loss) -> None:
    assert moments(causalrm_dr(loss, WRONG_PROPENSITY, TRUE))[0] == pytest.approx(float(loss(LOGIT, TRUE).mean()), abs=1e-12)


@losses
def test_bias_appears_where_a_theorem_does_not_hold(loss) -> None:
    ideal = float(loss(LOGIT, TRUE).mean())
    noisy = NoiseRates(0.0, 0.0)
    for broken in (
        causalrm_ips(loss, WRONG_PROPENSITY),
        causalrm_ips(loss, PROPENSITY, noisy),
        causalrm_dr(loss, WRONG_PROPENSITY, IMPUTATION),
        causalrm_dr(loss, PROPENSITY, TRUE, noisy),
    ):
        assert abs(moments(broken)[0] - ideal) > 0.005


@losses
def test_variance_of_dr_is_below_ips_if_imputation_is_near(loss) -> None:
    # theorem 3 asks for an imputed loss within (0, 2 l~) of the loss, on average; the right one is
    assert moments(causalrm_dr(loss, PROPENSITY, TRUE))[1] < moments(causalrm_ips(loss, PROPENSITY))[1]


def test_estimators_equal_hand_values() -> None:
    loss, o, p = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 0.1, 0.25])
    imputed = torch.tensor([1.0, 3.0, 5.0])
    assert reweighted.naive_weights(o).tolist() == [1.5, 0.0, 1.5]
    torch.testing.assert_close(reweighted.ips(loss, o, p), torch.tensor([4.0, 0.0, 24.0]))
    torch.testing.assert_close(reweighted.snips(loss, o, p), torch.tensor([2.0, 0.0, 12.0]))  # weights 2, 4, of mean 2
    torch.testing.assert_close(reweighted.dr(loss, o, p, imputed), torch.tensor([3.0, 3.0, 9.0]))


@settings(max_examples=30)
@given(scale=st.floats(0.05, 1.0))
def test_snips_is_invariant_to_propensity_scale(scale: float) -> None:
    loss, o = bce(LOGIT, TRUE), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(reweighted.snips(loss, o, PROPENSITY * scale), reweighted.snips(loss, o, PROPENSITY))
    if scale < 0.9:
        assert float(reweighted.ips(loss, o, PROPENSITY * scale).mean()) > float(reweighted.ips(loss, o, PROPENSITY).mean())


def test_dr_reduces_to_ips_if_imputed_loss_is_zero() -> None:
    loss, o = bce(LOGIT, TRUE), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(reweighted.dr(loss, o, PROPENSITY, torch.zeros(3)), reweighted.ips(loss, o, PROPENSITY))


def test_ips_is_naive_if_propensity_is_the_observed_share() -> None:
    loss, o = bce(LOGIT, TRUE), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    share = torch.full((3,), 2 / 3, dtype=torch.float64)
    torch.testing.assert_close(reweighted.ips(loss, o, share), reweighted.naive_weights(o) * loss)


def test_loss_without_feedback_is_never_read() -> None:
    o, p = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    loss = torch.tensor([2.0, math.nan])
    for value in (reweighted.ips(loss, o, p), reweighted.snips(loss, o, p)):
        assert value.tolist() == [4.0, 0.0]
    assert reweighted.dr(loss, o, p, torch.tensor([1.0, 1.0])).tolist() == [3.0, 1.0]


def test_bad_input_is_named() -> None:
    loss, o, p = torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"propensity must be in \(0, 1\], got min=0 max=0.5"):
        reweighted.ips(loss, o, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="propensity must be finite, got nan at position 1"):
        reweighted.dr(loss, o, torch.tensor([0.5, math.nan]), loss)
    with pytest.raises(ValueError, match="loss where o = 1 must be finite, got nan"):
        reweighted.ips(torch.tensor([math.nan, 1.0]), o, p)
    with pytest.raises(ValueError, match=r"o must be 0 or 1, got 0\.5 at position 0"):
        reweighted.naive_weights(torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="at least one row with feedback, got none in 2 rows"):
        reweighted.snips(loss, torch.zeros(2), p)
    with pytest.raises(ValueError, match=r"rows must match, got \{'o': 2, 'propensity': 3\}"):
        reweighted.ips(loss, o, torch.ones(3))
    with pytest.raises(ValueError, match=r"rows must match, got \{'o': 2, 'loss': 3\}"):
        reweighted.ips(torch.ones(3), o, p)
