"""The simulated log holds to its protocol: hand numbers, exact rates, shares within 3 standard errors, and nothing leaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrm_ray.data.simulate import (
    SimulatedLog,
    feature_quintiles,
    preferences,
    propensities,
    rate_scale,
    rescale,
    simulate,
    threshold,
)
from causalrm_ray.errors import InputError
from causalrm_ray.types import SCENARIOS, NoiseRates

ROWS = 20_000
LEVELS = torch.arange(ROWS).remainder(5).float()
FEATURES = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))


def log(
    alpha: float = 0.5, scenario: int | NoiseRates = 1, selection="label", seed: int = 0, levels: Tensor = LEVELS
) -> SimulatedLog:
    return simulate(levels, FEATURES, alpha=alpha, scenario=scenario, selection=selection, seed=seed)


def test_propensity_equals_hand_values() -> None:
    # weights 1, 1/2, 1/4, 1/8, 1/16 add up to 31/16; k = 0.2 * 5 / (31/16) = 16/31
    expected = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64) / 31
    torch.testing.assert_close(propensities(torch.arange(1.0, 6.0), 0.5), expected)


def test_a_propensity_cut_at_one_keeps_the_mean() -> None:
    # of ten rows one scores 5 and nine score 4: k = 2 / (1 + 0.9) would make the first 1.05
    p = propensities(torch.tensor([5.0] + [4.0] * 9), 0.1)
    torch.testing.assert_close(p, torch.tensor([1.0] + [1 / 9] * 9, dtype=torch.float64))


def test_a_scale_weighs_rows_by_their_shares() -> None:
    weight, share = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 6.0, 1.0]).double()
    assert rate_scale(weight, share, 0.125) == pytest.approx(0.1)  # (4 k + 6 k) / 8
    assert rate_scale(weight, share, 0.5) == pytest.approx(0.5)  # (1 + 6 k) / 8: the first row is cut at 1
    assert rate_scale(torch.zeros(3).double(), share, 0.5) == 0.0


@settings(max_examples=50)
@given(
    levels=st.lists(st.integers(0, 4), min_size=2, max_size=40).filter(lambda found: len(set(found)) > 1),
    alpha=st.floats(0.01, 1.0),
    rate=st.floats(0.05, 0.95),
)
def test_propensity_has_the_mean_and_lies_in_the_unit_interval(levels: list[int], alpha: float, rate: float) -> None:
    score = rescale(torch.tensor(levels))
    p = propensities(score, alpha, rate)
    assert float(p.mean()) == pytest.approx(rate, rel=1e-9)
    assert 0 < float(p.min()) <= float(p.max()) <= 1
    order = torch.argsort(score)
    assert bool((p[order].diff() >= -1e-12).all())


def test_scores_are_levels_drawn_to_one_to_five() -> None:
    assert rescale(torch.tensor([0.0, 1.0, 4.0])).tolist() == [1.0, 2.0, 5.0]
    assert rescale(torch.tensor([10.0, 0.0, 5.0])).tolist() == [5.0, 1.0, 3.0]


def test_answers_above_the_median_are_liked() -> None:
    assert threshold(LEVELS) == 2.0
    assert preferences(torch.arange(5.0), 2.0).tolist() == [0, 0, 0, 1, 1]
    assert threshold(torch.tensor([0.0, 1.0, 2.0, 2.0])) == 1.0  # half of the rows are liked


def test_only_the_highest_level_is_liked_where_nothing_lies_above_the_median() -> None:
    levels = torch.tensor([0.0, 2.0, 4.0, 4.0, 4.0])
    assert preferences(levels, threshold(levels)).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("selection", ["label", "features"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_shares_are_as_set_within_three_standard_errors(scenario: int, selection: str) -> None:
    made = log(scenario=scenario, selection=selection)
    drives = rescale(LEVELS) if selection == "label" else rescale(feature_quintiles(FEATURES))
    for score in range(1, 6):
        rows = drives == score
        assert_share(made.o[rows], 2.0 ** (score - 1) / 31)
    liked, disliked = (made.o == 1) & (made.preference == 1), (made.o == 1) & (made.preference == 0)
    assert_share(1 - made.r[liked], made.rates.rho_01)
    assert_share(made.r[disliked], made.rates.rho_10)
    assert made.rates == {1: NoiseRates(0.2, 0.1), 2: NoiseRates(0.1, 0.2)}[scenario]


def assert_share(outcome: Tensor, share: float) -> None:
    assert abs(float(outcome.mean()) - share) < 3 * (share * (1 - share) / len(outcome)) ** 0.5


def test_selection_by_the_label_is_not_at_random_and_by_features_is() -> None:
    by_label, by_features = log(), log(selection="features")
    assert float(by_label.preference[by_label.o == 1].mean()) == pytest.approx(24 / 31, abs=0.02)  # 0.4 of all rows
    assert float(by_features.preference[by_features.o == 1].mean()) == pytest.approx(0.4, abs=0.03)
    for scenario in SCENARIOS:
        assert torch.equal(log(scenario=scenario, selection="features").propensity, by_features.propensity)


def test_flips_and_truth_are_seen_only_where_there_is_feedback() -> None:
    made = log()
    assert made.r[made.o == 0].unique().tolist() == [0.0]
    assert torch.equal(made.preference, preferences(LEVELS, 2.0))
    assert 0.1 < float((made.r != made.preference)[made.o == 1].double().mean()) < 0.2


def test_quintiles_follow_one_fixed_direction() -> None:
    quintile = feature_quintiles(FEATURES)
    assert quintile.bincount().tolist() == [ROWS // 5] * 5
    shifted = feature_quintiles(2 * FEATURES + torch.tensor([1.0, -2.0, 3.0]))
    assert float((shifted == quintile).double().mean()) > 0.999
    means = torch.stack([FEATURES[quintile == number].mean(0) for number in range(5)]).double()
    direction = means[4] - means[0]
    along = means @ direction
    assert bool((along.diff() > 0).all())
    assert torch.equal(log(selection="features", seed=1).propensity, log(selection="features", seed=0).propensity)


def test_a_seed_repeats_and_settings_share_its_draws() -> None:
    assert torch.equal(log(seed=3).r, log(seed=3).r)
    assert not torch.equal(log(seed=3).o, log(seed=4).o)
    gentle, strong = log(alpha=0.9), log(alpha=0.5)
    likelier = strong.propensity >= gentle.propensity
    assert bool((strong.o >= gentle.o)[likelier].all())


def test_rates_may_take_a_scenarios_place() -> None:
    assert torch.equal(log(scenario=NoiseRates(0.2, 0.1)).r, log(scenario=1).r)
    made = log(scenario=NoiseRates(0.05, 0.0))
    assert_share(1 - made.r[(made.o == 1) & (made.preference == 1)], 0.05)
    assert made.r[(made.o == 1) & (made.preference == 0)].unique().tolist() == [0.0]
    assert made.rates == NoiseRates(0.05, 0.0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"scenario must be one of \[1, 2\], got 3"):
        log(scenario=3)
    with pytest.raises(ValueError, match=r"selection must be one of .*'features'.*, got 'luck'"):
        log(selection="luck")
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got 0"):
        log(alpha=0)
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\), got 1"):
        propensities(LEVELS, 0.5, 1)
    with pytest.raises(ValueError, match=r"rows must match, got \{'levels': 2, 'features': 20000\}"):
        log(levels=LEVELS[:2])
    with pytest.raises(InputError, match=r"levels must hold at least two values, got \[1.0\] in 20000 rows"):
        log(levels=torch.ones(ROWS))
    with pytest.raises(ValueError, match=r"features must be \[N, D\] with N >= 5, got shape \(4, 3\)"):
        feature_quintiles(FEATURES[:4])
