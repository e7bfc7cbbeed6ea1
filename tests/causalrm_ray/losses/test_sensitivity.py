"""Bounds under hidden selection are those of brute force; corrected labels are right on average."""

from __future__ import annotations

import itertools

import pytest
import torch

from causalrm_ray.losses.reweighted import snips
from causalrm_ray.losses.sensitivity import (
    corrected_label,
    hidden_selection_bounds,
    hidden_selection_weights,
    largest_mean,
    sign_change,
)
from causalrm_ray.types import NoiseRates

GAMMA = torch.tensor([1.0, 1.3, 2.0, 7.0], dtype=torch.float64)


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, with ties and outside [0, 1], and propensities."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(-2, 4, (count,), generator=generator).double() / 2
    return label, 0.05 + 0.9 * torch.rand(count, generator=generator, dtype=torch.float64)


def test_corrected_label_has_the_preference_as_its_mean() -> None:
    rates = NoiseRates(0.2, 0.1)
    y = corrected_label(torch.tensor([0.0, 1.0]), rates)
    assert float(0.2 * y[0] + 0.8 * y[1]) == pytest.approx(1.0)  # r* = 1
    assert float(0.9 * y[0] + 0.1 * y[1]) == pytest.approx(0.0, abs=1e-12)  # r* = 0
    assert y.tolist() == pytest.approx([-1 / 7, 9 / 7])


def test_weights_by_hand() -> None:
    low, high = hidden_selection_weights(torch.tensor([0.2, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0]))
    assert low.tolist() == [pytest.approx([5.0, 1.0]), pytest.approx([3.0, 1.0])]
    assert high.tolist() == [pytest.approx([5.0, 1.0]), pytest.approx([9.0, 1.0])]


@pytest.mark.parametrize("gamma", [1.5, 4.0])
def test_weights_are_those_of_propensities_whose_odds_differ_by_gamma(gamma: float) -> None:
    propensity = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    low, high = hidden_selection_weights(propensity, torch.tensor([gamma]))
    odds = propensity / (1 - propensity)
    torch.testing.assert_close((1 / low[0]) / (1 - 1 / low[0]), odds * gamma)
    torch.testing.assert_close((1 / high[0]) / (1 - 1 / high[0]), odds / gamma)


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 1), (5, 2), (9, 3), (12, 4)])
def test_bounds_are_those_of_all_extreme_weights(count: int, seed: int) -> None:
    label, propensity = rows(count, seed)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)
    low, high = hidden_selection_bounds(label, propensity, GAMMA)
    for number, gamma in enumerate(GAMMA.tolist()):
        odds = (1 - propensity) / propensity
        weight = 1 + odds * torch.where(corners == 1, gamma, 1 / gamma)
        means = (weight * label).sum(1) / weight.sum(1)
        assert float(low[number]) == pytest.approx(float(means.min()))
        assert float(high[number]) == pytest.approx(float(means.max()))


def test_no_weights_between_the_extremes_do_better() -> None:
    label, propensity = rows(30, 5)
    low, high = hidden_selection_weights(propensity, torch.tensor([3.0]))
    best = float(largest_mean(label, low, high)[0])
    inside = low + (high - low) * torch.rand(2000, 30, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert float(((inside * label).sum(1) / inside.sum(1)).max()) <= best


def test_without_hidden_selection_both_bounds_are_the_self_normalised_estimate() -> None:
    label, propensity = rows(40, 7)
    low, high = hidden_selection_bounds(label, propensity, torch.tensor([1.0]))
    expected = float(snips(label, torch.ones(40, dtype=torch.float64), propensity).mean())
    assert (float(low), float(high)) == (pytest.approx(expected), pytest.approx(expected))


def test_bounds_widen_with_gamma_and_end_at_the_extreme_labels() -> None:
    label, propensity = rows(40, 8)
    low, high = hidden_selection_bounds(label, propensity, torch.tensor([1.0, 1.5, 4.0, 1e9]))
    assert bool((low.diff() < 0).all())
    assert bool((high.diff() > 0).all())
    assert (float(low[-1]), float(high[-1])) == (pytest.approx(float(label.min())), pytest.approx(float(label.max())))


def test_rows_of_one_label_may_be_given_as_one() -> None:
    label, propensity = rows(30, 9)
    low, high = hidden_selection_weights(propensity, GAMMA)
    values, place = label.unique(return_inverse=True)
    sums = [torch.zeros(len(GAMMA), len(values), dtype=torch.float64).index_add(1, place, weight) for weight in (low, high)]
    assert len(values) < len(label)
    torch.testing.assert_close(largest_mean(values, *sums), largest_mean(label, low, high))


def test_sign_changes_where_the_bounds_of_the_groups_meet() -> None:
    label, propensity = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), torch.full((6,), 0.5)
    top = torch.tensor([True, True, True, False, False, False])
    # Each group's bound is 2 (1 + 1/G) / (2 (1 + 1/G) + 1 + G) = 2 / (2 + G), and its mirror: they meet at 1/2, G = 2.
    assert sign_change(label, propensity, top) == pytest.approx(2.0, rel=1e-5)
    assert sign_change(1 - label, propensity, top) == 1.0
    assert sign_change(top.float(), propensity, top) is None  # no zero above, no one below: no weights can undo that


def test_bad_arguments_are_named() -> None:
    label, propensity = rows(4, 0)
    with pytest.raises(ValueError, match=r"gamma must be at least 1, got 0\.5"):
        hidden_selection_bounds(label, propensity, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="label must hold at least one row with feedback, got none"):
        hidden_selection_bounds(label[:0], propensity[:0], torch.tensor([1.0]))
    with pytest.raises(ValueError, match="rows must match"):
        hidden_selection_bounds(label, propensity[:3], torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"propensity must be in \(0, 1\], got min=0"):
        hidden_selection_bounds(label, torch.zeros(4), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="top must hold some rows and leave some, got 0 of 4"):
        sign_change(label, propensity, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"r must be 0 or 1, got 2\.0 at position 1"):
        corrected_label(torch.tensor([1.0, 2.0]), NoiseRates(0.1, 0.1))
