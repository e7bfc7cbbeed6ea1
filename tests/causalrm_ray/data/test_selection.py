"""Selection by a trait and by popularity: hand numbers, naive loops, shares within 3 standard errors, one truth for all seeds."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from causalrm_ray.data.simulate import (
    WITHOUT_ALPHA,
    SimulatedLog,
    feature_trait,
    popularity,
    popularity_strata,
    prompt_popularity,
    simulate,
)
from causalrm_ray.errors import InputError
from causalrm_ray.types import Selection

ROWS = 30_000
LEVELS = torch.arange(ROWS).remainder(5).float()
FEATURES = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
PROMPTS = torch.arange(ROWS) // 10
NEW: tuple[Selection, ...] = ("trait", "popularity", "mixed")
ALL: tuple[Selection, ...] = get_args(Selection)


def log(
    selection: Selection, prompts: Tensor | None = None, seed: int = 0, rate: float = 0.2, alpha: float | None = 0.5
) -> SimulatedLog:
    return simulate(LEVELS, FEATURES, alpha=alpha, scenario=1, selection=selection, seed=seed, rate=rate, prompts=prompts)


def naive_along(features: Tensor, stream: int) -> list[float]:
    """X @ w, row by row."""
    direction = np.random.default_rng([0, stream]).standard_normal(features.shape[1]).tolist()
    return [sum(x * w for x, w in zip(row, direction, strict=True)) for row in features.double().tolist()]


def naive_propensity(weights: list[float], rate: float) -> list[float]:
    """min(1, k weight) of the mean `rate`, k by bisection."""
    low, high = 0.0, 1.0 / min(weights)
    for _ in range(200):
        k = (low + high) / 2
        mean = sum(min(1.0, k * weight) for weight in weights) / len(weights)
        low, high = (k, high) if mean < rate else (low, k)
    return [min(1.0, k * weight) for weight in weights]


def assert_close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_with_the_trait_the_pleased_give_feedback_and_without_it_the_displeased() -> None:
    levels, features = torch.arange(10).remainder(5).float(), torch.tensor([[1.0]] * 5 + [[-1.0]] * 5)
    made = simulate(levels, features, alpha=0.5, scenario=1, selection="trait", seed=0)
    with_trait = np.random.default_rng([0, 1]).standard_normal() > 0  # the sign of w
    # both halves weigh 1/16, 1/8, 1/4, 1/2, 1 in some order: 31/8 in all, so k = 0.2 * 10 / (31/8) = 16/31
    rising = [1 / 31, 2 / 31, 4 / 31, 8 / 31, 16 / 31]
    assert_close(made.propensity, rising + rising[::-1] if with_trait else rising[::-1] + rising)
    assert made.strata is not None
    assert made.strata.tolist() == ([1] * 5 + [0] * 5 if with_trait else [0] * 5 + [1] * 5)


def test_the_trait_is_on_which_side_of_its_mean_a_row_lies() -> None:
    along = naive_along(FEATURES, 1)
    mean = sum(along) / ROWS
    assert feature_trait(FEATURES).tolist() == [int(value > mean) for value in along]
    shifted = feature_trait(FEATURES.double() + 100)  # states of a language model have no mean of 0
    assert float((shifted == feature_trait(FEATURES)).double().mean()) > 0.999


def test_popularity_without_prompts_follows_a_second_direction() -> None:
    features = FEATURES[:200]
    along = naive_along(features, 3)
    mean = sum(along) / 200
    spread = math.sqrt(sum((value - mean) ** 2 for value in along) / 200)
    assert_close(popularity(features), [math.exp(1.5 * (value - mean) / spread) for value in along])
    assert abs(float(np.corrcoef(naive_along(FEATURES, 1), naive_along(FEATURES, 3))[0, 1])) < 0.99


def test_popularity_of_prompts_is_log_normal_and_one_for_each() -> None:
    popular = prompt_popularity(torch.tensor([7, -3, 7, 7, 0]))
    assert popular[[0, 2, 3]].unique().numel() == 1
    assert popular.unique().numel() == 3
    number = 20_000
    logs = prompt_popularity(torch.arange(number)).log()
    assert abs(float(logs.mean())) < 3 * 1.5 / number**0.5
    assert abs(float(logs.std()) - 1.5) < 3 * 1.5 / (2 * number) ** 0.5
    assert abs(float((logs < 1.5).double().mean()) - 0.8413) < 3 * (0.8413 * 0.1587 / number) ** 0.5  # P(Z < 1)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("selection", WITHOUT_ALPHA)
def test_propensity_by_popularity_equals_a_naive_loop(selection: Selection, numbered: bool) -> None:
    levels, features, prompts = LEVELS[:300], FEATURES[:300], PROMPTS[:300] if numbered else None
    popular = (popularity(features) if prompts is None else prompt_popularity(prompts)).tolist()
    factor = 3.0 if selection == "mixed" else 1.0
    weights = [value * (factor if level > 2 else 1.0) for value, level in zip(popular, levels.tolist(), strict=True)]
    made = simulate(levels, features, alpha=None, scenario=1, selection=selection, seed=0, prompts=prompts)
    assert_close(made.propensity, naive_propensity(weights, 0.2))


def test_the_pleased_give_feedback_three_times_as_readily_under_mixed() -> None:
    levels, prompts = torch.tensor([0.0, 4.0, 0.0, 0.0]), torch.tensor([5, 5, 5, 5])
    made = simulate(levels, torch.zeros(4, 1), alpha=None, scenario=1, selection="mixed", seed=0, prompts=prompts)
    assert_close(made.propensity, [0.8 / 6, 2.4 / 6, 0.8 / 6, 0.8 / 6])  # of weights 1, 3, 1, 1 and a mean of 0.2


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("selection", ALL)
def test_the_mean_propensity_is_the_feedback_rate(selection: Selection, rate: float) -> None:
    made = log(selection, rate=rate)
    assert float(made.propensity.double().mean()) == pytest.approx(rate, rel=1e-6)
    assert 0 < float(made.propensity.min()) <= float(made.propensity.max()) <= 1


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("selection", NEW)
def test_shares_of_feedback_are_as_set_within_three_standard_errors(selection: Selection, numbered: bool) -> None:
    made = log(selection, PROMPTS if numbered else None)
    assert made.strata is not None
    for stratum in made.strata.unique():
        for liked in (0, 1):
            rows = (made.strata == stratum) & (made.preference == liked)
            p = made.propensity[rows].double()
            error = float((p * (1 - p)).sum()) ** 0.5 / len(p)
            assert abs(float(made.o[rows].double().mean() - p.mean())) < 3 * error


def test_the_log_carries_the_trait_and_thirds_of_popularity() -> None:
    assert log("label").strata is None
    assert log("features").strata is None
    assert torch.equal(log("trait").strata, feature_trait(FEATURES))
    for selection in WITHOUT_ALPHA:
        strata = log(selection).strata
        assert strata is not None
        assert strata.bincount().tolist() == [ROWS // 3] * 3
        assert [float(popularity(FEATURES)[strata == third].max()) for third in range(3)] == sorted(
            float(popularity(FEATURES)[strata == third].max()) for third in range(3)
        )


def test_rows_of_equal_popularity_share_a_third() -> None:
    assert popularity_strata(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).double()).tolist() == [0, 0, 1, 1, 2, 2]
    assert popularity_strata(torch.tensor([2.0, 2.0, 2.0, 2.0, 1.0, 9.0]).double()).tolist() == [0, 0, 0, 0, 0, 1]
    strata = log("popularity", PROMPTS).strata
    assert strata is not None
    assert bool((strata.reshape(-1, 10) == strata[::10, None]).all())


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("selection", ALL)
def test_who_selects_is_the_same_under_every_seed_and_the_draws_in_every_setting(selection: Selection, numbered: bool) -> None:
    made, other = (log(selection, PROMPTS if numbered else None, seed=seed) for seed in (0, 1))
    assert torch.equal(made.propensity, other.propensity)
    assert not torch.equal(made.o, other.o)
    by_label = log("label")
    likelier = made.propensity >= by_label.propensity
    assert bool((made.o >= by_label.o)[likelier].all())
    both = (made.o == 1) & (by_label.o == 1)
    assert torch.equal(made.r[both], by_label.r[both])


def test_alpha_is_read_only_where_it_matters() -> None:
    for selection in WITHOUT_ALPHA:
        assert torch.equal(log(selection, alpha=None).o, log(selection, alpha=0.1).o)
    for selection in ("label", "features", "trait"):
        assert not torch.equal(log(selection, alpha=0.9).propensity, log(selection, alpha=0.1).propensity)
        with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got None"):
            log(selection, alpha=None)


@pytest.mark.parametrize("selection", NEW)
def test_features_that_are_all_equal_select_no_one(selection: Selection) -> None:
    with pytest.raises(InputError, match="features must differ between rows where they select, got 30000 equal rows"):
        simulate(LEVELS, torch.ones(ROWS, 3), alpha=0.5, scenario=1, selection=selection, seed=0)


def test_prompts_must_match_the_rows() -> None:
    with pytest.raises(ValueError, match=r"rows must match, got \{'levels': 30000, 'features': 30000, 'prompts': 7\}"):
        log("popularity", PROMPTS[:7])
