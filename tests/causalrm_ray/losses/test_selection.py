"""Likelihoods of outcomes against sums over grades, opinions and label noise; the pseudo-label against exact enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from causalrm_ray.losses.selection import (
    DISLIKED,
    LIKED,
    MISSING,
    class_weights,
    class_wise_dr_label,
    graded_outcomes,
    outcomes,
)
from causalrm_ray.types import NoiseRates

RATES = NoiseRates(0.2, 0.1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(f: float, a: float, c: float, d: float) -> list[float]:
    """P(missing), P(disliked), P(liked), added up over grades, whether feedback is given, and whether its label is flipped."""
    cuts = [0.0, 1 - sigmoid(f + 1), 1 - sigmoid(f), 1 - sigmoid(f - 1), 1.0]  # of the utility's distribution at -1, 0, +1
    total = [0.0, 0.0, 0.0]
    for grade, (low, high) in enumerate(itertools.pairwise(cuts)):
        liked = grade >= 2
        better = grade in (1, 3)
        gives = sigmoid(a + c * liked + (d / 2 if better else -d / 2))
        rho = RATES.rho_01 if liked else RATES.rho_10
        total[MISSING] += (high - low) * (1 - gives)
        total[LIKED] += (high - low) * gives * (1 - rho if liked else rho)
        total[DISLIKED] += (high - low) * gives * (rho if liked else 1 - rho)
    return total


@pytest.mark.parametrize(("f", "a", "c", "d"), [(0.3, -1.0, 1.2, 0.7), (-2.0, 0.5, -0.8, 0.0), (4.0, -3.0, 2.0, -1.0)])
def test_outcomes_equal_the_sum_over_everything_that_may_have_happened(f: float, a: float, c: float, d: float) -> None:
    given = [torch.tensor(value, dtype=torch.float64) for value in (f, a, c, d, RATES.rho_01, RATES.rho_10)]
    logprob, on1, on0 = graded_outcomes(*given)
    torch.testing.assert_close(logprob.exp(), torch.tensor(naive(f, a, c, d), dtype=torch.float64))
    torch.testing.assert_close(1 - on1 - on0, logprob[MISSING].exp())
    if d == 0:
        torch.testing.assert_close(float(on1), sigmoid(f) * sigmoid(a + c))


def test_outcomes_broadcast_over_rows_and_members() -> None:
    f = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    a = torch.full((7, 1), -1.0)
    logprob, _, _ = graded_outcomes(f, a, a + 2, a * 0, torch.tensor(0.1), torch.tensor(0.2))
    assert logprob.shape == (7, 3, 3)
    torch.testing.assert_close(logprob.exp().sum(-1), torch.ones(7, 3))


def test_feedback_that_was_not_given_is_never_read() -> None:
    o = torch.tensor([1.0, 1.0, 0.0, 0.0])
    for hidden in (0.0, 1.0, math.nan):
        r = torch.tensor([1.0, 0.0, hidden, hidden])
        assert outcomes(o, r).tolist() == [LIKED, DISLIKED, MISSING, MISSING]


def population(e: float, p1: float, p0: float, rows: int = 10_000) -> tuple[Tensor, Tensor]:
    """(o, r) of `rows` rows, in which every combination of opinion, feedback and flip is exactly as frequent as likely."""
    o, r = [], []
    for clean, gives, flips in itertools.product((1, 0), (1, 0), (1, 0)):
        propensity, rho = (p1, RATES.rho_01) if clean else (p0, RATES.rho_10)
        chance = (e if clean else 1 - e) * (propensity if gives else 1 - propensity) * (rho if flips else 1 - rho)
        count = round(chance * rows)
        assert count == pytest.approx(chance * rows)
        o += [float(gives)] * count
        r += [float(clean != flips) if gives else math.nan] * count
    return torch.tensor(o, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)


@pytest.mark.parametrize(("e", "p1", "p0"), [(0.3, 0.6, 0.2), (0.8, 0.1, 0.5)])
def test_class_weights_average_to_the_shares_of_opinions(e: float, p1: float, p0: float) -> None:
    o, r = population(e, p1, p0)
    ones = torch.ones_like(o)
    v1, v0 = class_weights(o, r, p1 * ones, p0 * ones, RATES)
    assert float(v1.mean()) == pytest.approx(e)
    assert float(v0.mean()) == pytest.approx(1 - e)


@pytest.mark.parametrize("m", [0.0, 0.35, 1.0])
@pytest.mark.parametrize(("e", "p1", "p0"), [(0.3, 0.6, 0.2), (0.8, 0.1, 0.5)])
def test_label_is_unbiased_whatever_is_imputed(e: float, p1: float, p0: float, m: float) -> None:
    o, r = population(e, p1, p0)
    ones = torch.ones_like(o)
    label = class_wise_dr_label(m * ones, *class_weights(o, r, p1 * ones, p0 * ones, RATES))
    assert float(label.mean()) == pytest.approx(e)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_label_is_unbiased_with_the_right_imputation_where_both_propensities_are_off_by_one_factor(factor: float) -> None:
    e, p1, p0 = 0.3, 0.6, 0.2
    o, r = population(e, p1, p0)
    ones = torch.ones_like(o)
    off = class_weights(o, r, factor * p1 * ones, factor * p0 * ones, RATES)
    assert float(class_wise_dr_label(e * ones, *off).mean()) == pytest.approx(e)
    assert abs(float(class_wise_dr_label(e * ones, *class_weights(o, r, factor * p1 * ones, p0 * ones, RATES)).mean()) - e) > 0.02


def test_label_reduces_to_causalrm_dr_where_propensities_agree() -> None:
    generator = torch.Generator().manual_seed(1)
    o = (torch.rand(4000, generator=generator) < 0.4).double()
    r = o * (torch.rand(4000, generator=generator) < 0.6).double()
    p, m = torch.full((4000,), 0.4, dtype=torch.float64), torch.rand(4000, generator=generator).double()
    corrected = (r - RATES.rho_10) / (1 - RATES.rho_01 - RATES.rho_10)
    expected = m + o / p * (corrected - m) / (o / p).mean()
    torch.testing.assert_close(class_wise_dr_label(m, *class_weights(o, r, p, p, RATES)), expected)


def test_propensities_of_zero_and_imputations_outside_are_named() -> None:
    row = [torch.tensor([value]) for value in (1.0, 1.0, 0.0, 0.5)]
    with pytest.raises(ValueError, match=r"p1 must be in \(0, 1\]"):
        class_weights(*row, RATES)
    with pytest.raises(ValueError, match=r"m must be in \[0, 1\]"):
        class_wise_dr_label(torch.tensor([1.5]), row[0], row[0])
