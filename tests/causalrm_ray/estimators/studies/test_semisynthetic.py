"""Predictions of known faults by hand, and which estimators are unbiased for their risk: by enumeration and over draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from causalrm_ray.data.simulate import preferences, rescale, simulate, threshold
from causalrm_ray.estimators.core.task import Nuisances, Observations
from causalrm_ray.estimators.studies.semisynthetic import (
    ESTIMATORS,
    PREDICTIONS,
    Bias,
    bias_table,
    estimate,
    logit_of_score,
    rotate,
    skew,
)
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.types import SCENARIOS, NoiseRates

SCORE = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 4.0, 5.0])
UNBIASED = ("causalrm_ips", "causalrm_dr")
BIASED = ("naive", "ips", "f_correction")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_predictions_equal_hand_values() -> None:
    assert rotate(SCORE, generator()).tolist() == [5, 5, 5, 1, 2, 3, 3, 4]
    assert sorted(PREDICTIONS["ONE"](SCORE, generator()).tolist()) == [
        1,
        1,
        2,
        3,
        4,
        4,
        5,
        5,
    ]  # one highest, so one lowest goes up
    assert sorted(PREDICTIONS["FOUR"](SCORE, generator()).tolist()) == [1, 1, 1, 2, 3, 4, 5, 5]


def test_predictions_know_the_levels_that_there_are() -> None:
    three = torch.tensor([1.0, 3.0, 5.0])
    assert rotate(three, generator()).tolist() == [5, 1, 3]
    assert PREDICTIONS["ONE"](three, generator()).tolist() == [5, 3, 5]
    assert PREDICTIONS["FOUR"](three, generator()).tolist() == [1, 5, 5]


def test_skew_is_unbiased_in_the_middle_and_wider_for_low_scores() -> None:
    spread = {score: skew(torch.full((20_000,), float(score)), generator()) for score in (1, 3, 5)}
    assert all(1 <= float(values.min()) <= float(values.max()) <= 5 for values in spread.values())
    assert float(spread[3].mean()) == pytest.approx(3.0, abs=3 * 1.5 / 20_000**0.5)
    assert float((spread[5] < 4.5).double().mean()) == pytest.approx(0.1587, abs=0.01)  # P(Z < -1), sigma 0.5
    assert float((spread[1] > 3.5).double().mean()) == pytest.approx(0.1587, abs=0.01)  # P(Z > 1), sigma 2.5


def test_scores_mean_probabilities() -> None:
    prob = torch.sigmoid(logit_of_score(torch.arange(1.0, 6.0)))
    torch.testing.assert_close(prob, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))


def test_estimates_equal_hand_values() -> None:
    logit = torch.zeros(4, dtype=torch.float64)  # the loss of either label is log 2
    observations = Observations(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    nuisances = Nuisances(torch.tensor([0.5, 0.25, 0.5, 0.5], dtype=torch.float64), NoiseRates(0.2, 0.1), torch.ones(4))
    values = {name: estimate(ESTIMATORS[name], logit, observations, nuisances) for name in ESTIMATORS}
    assert values["naive"] == pytest.approx(math.log(2))
    assert (values["ips"], values["causalrm_ips"]) == pytest.approx((1.5 * math.log(2), 1.5 * math.log(2)))  # (2 + 4) / 4
    assert (values["dr"], values["causalrm_dr"]) == pytest.approx((math.log(2), math.log(2)))
    # q = 0.8 * 0.5 + 0.1 * 0.5 = 0.45
    assert values["f_correction"] == pytest.approx(-(math.log(0.45) + math.log(0.55)) / 2)


@pytest.mark.parametrize("name", [*UNBIASED, *BIASED, "dr"])
def test_expectation_by_enumeration_is_the_ideal_risk_only_where_the_theory_says_so(name: str) -> None:
    preference, propensity = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.8, 0.2, 0.4], dtype=torch.float64)
    rates, logit = NoiseRates(0.2, 0.1), torch.tensor([-1.0, 0.5, 0.2], dtype=torch.float64)
    nuisances = Nuisances(propensity, rates, torch.tensor([0.4, 0.4, 0.4], dtype=torch.float64))  # a poor guess
    liked = torch.where(preference == 1, 1 - rates.rho_01, rates.rho_10).double()
    mean = seen = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=6):
        o, r = torch.tensor(bits).split(3)
        chance = float((torch.where(o == 1, propensity, 1 - propensity) * torch.where(r == 1, liked, 1 - liked)).prod())
        if o.any():  # the naive mean is not defined without feedback; the others are 0 or the imputed risk
            mean += chance * estimate(ESTIMATORS[name], logit, Observations(o, r), nuisances)
            seen += chance
        elif name.endswith("dr"):
            mean += chance * float(bce(logit, nuisances.imputation).mean())
    ideal = float(bce(logit, preference).mean())
    if name in UNBIASED:
        assert mean == pytest.approx(ideal, abs=1e-6)
    else:
        assert abs(mean / seen - ideal) > 0.01


def table(selection, scenario: int = 1) -> dict[tuple[str, str], Bias]:
    levels = torch.arange(4000).remainder(5).float()
    features = torch.randn(4000, 2, generator=generator()) + levels[:, None] / 4
    logs = [simulate(levels, features, alpha=0.5, scenario=scenario, selection=selection, seed=seed) for seed in range(40)]
    draws = [Observations(log.o, log.r) for log in logs]
    preference = preferences(levels, threshold(levels))
    found = bias_table(rescale(levels), preference, logs[0].propensity, SCENARIOS[scenario], draws)
    return {(bias.prediction, bias.estimator): bias for bias in found}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("selection", ["label", "features"])
def test_causalrm_is_unbiased_and_the_others_are_not(selection: str, scenario: int) -> None:
    found = table(selection, scenario)
    assert {kind for kind, _ in found} == set(PREDICTIONS)
    assert {name for _, name in found} == set(ESTIMATORS)
    for kind in PREDICTIONS:
        for name in UNBIASED:
            bias = found[kind, name]
            assert abs(bias.relative) < 3 * bias.stderr + 1e-4, bias
    for kind in ("SKEW", "FOUR"):  # under ROTATE and ONE, false likes and false dislikes may cancel
        for name in BIASED:
            bias = found[kind, name]
            assert abs(bias.relative) > 3 * bias.stderr, bias
            assert bias.draws == 40


def test_ideal_and_relative_difference_equal_hand_values() -> None:
    score, preference = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    everything = Observations(torch.ones(2), preference)
    found = bias_table(score, preference, torch.ones(2), NoiseRates(0, 0), [everything] * 2)
    rotated = next(bias for bias in found if (bias.prediction, bias.estimator) == ("ROTATE", "naive"))
    # 0.9 for a dislike and 0.1 for a like
    assert (rotated.ideal, rotated.value) == pytest.approx((-math.log(0.1), -math.log(0.1)))
    assert (rotated.relative, rotated.stderr) == pytest.approx((0.0, 0.0), abs=1e-12)  # sums in two orders


def test_bad_input_is_named() -> None:
    score, preference = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    everything = Observations(torch.ones(2), preference)
    with pytest.raises(ValueError, match="logs must hold at least two draws, got 1"):
        bias_table(score, preference, torch.ones(2), NoiseRates(0, 0), [everything])
    with pytest.raises(ValueError, match=r"rows must match, got \{'score': 2, 'preference': 3, 'propensity': 2\}"):
        bias_table(score, torch.ones(3), torch.ones(2), NoiseRates(0, 0), [everything])
    with pytest.raises(ValueError, match=r"this method needs \['rates'\], got no rates"):
        estimate(ESTIMATORS["f_correction"], torch.zeros(2), everything, Nuisances())
