"""Diagnostics against hand numbers, naive loops and a world whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.diagnostics.diagnose import (
    GAMMAS,
    RHO_GRID,
    FitDiagnostics,
    diagnose_fit,
    gamma_sensitivity,
    overlap,
    ranking,
    reward_calibration,
    weight_spread,
)
from causalrm_ray.estimators.diagnostics.selection import mechanisms
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models
from causalrm_ray.losses.sensitivity import corrected_label, hidden_selection_bounds
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.types import NoiseRates

METHOD, RATES, ROWS = "causalrm_snips", NoiseRates(0.2, 0.1), 4000


def log(hidden: float = 0.0) -> tuple[Tensor, Observations, Tensor, Tensor]:
    """Features, observations, P(o=1 | x) as one would fit it, r*. An opinion moves the odds of feedback by exp(+-hidden / 2)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 2, generator=generator)
    clean = (torch.rand(ROWS, generator=generator) < torch.sigmoid(3 * x[:, 0])).float()
    logit = x[:, 1] - 0.5
    o = (torch.rand(ROWS, generator=generator) < torch.sigmoid(logit + hidden * (clean - 0.5))).float()
    wrong = torch.where(clean == 1, RATES.rho_01, RATES.rho_10)
    r = torch.where(torch.rand(ROWS, generator=generator) < wrong, 1 - clean, clean)
    return x, Observations(o, r), torch.sigmoid(logit), clean


@pytest.fixture(scope="module")
def fits() -> RewardFits:
    x, observations, propensity, _ = log()
    settings = FitSettings(4, 0.05, 256)
    return fit_reward_models(
        lambda: FeatureScorer(2, ()), FeatureRows(x), observations, propensity, [METHOD], settings, rates=RATES
    )


def diagnosed(fits: RewardFits) -> FitDiagnostics:
    x, observations, propensity, _ = log()
    logit = predict(fits.fits[METHOD].scorer, FeatureRows(x), fits.heldout)
    return diagnose_fit(fits, METHOD, observations, propensity, logit)


def test_overlap_counts_each_row_once_in_its_bin() -> None:
    propensity = torch.tensor([0.01, 0.02, 0.5, 0.97, 1.0])
    found = overlap(propensity, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]))
    assert found.with_feedback == (1, *[0] * 18, 2)
    assert found.without_feedback == (1, *[0] * 9, 1, *[0] * 9)
    assert found.edges == pytest.approx([number / 20 for number in range(21)])
    assert (found.smallest, found.largest) == (pytest.approx(0.01), 1.0)


def test_weights_by_hand() -> None:
    found = weight_spread(torch.tensor([0.1, 0.45, 0.45, 0.8], dtype=torch.float64))
    weight = [10, 1 / 0.45, 1 / 0.45, 1.25]
    mean = sum(weight) / 4
    assert (found.rows, found.counts) == (4, (0, 0, 1, 0, 2, *[0] * 14, 1))  # bins are 0.5 / mean wide
    assert (found.quantiles[0], found.quantiles[4], found.quantiles[-1]) == pytest.approx(
        (1.25 / mean, 1 / 0.45 / mean, 10 / mean)
    )
    assert found.edges == pytest.approx([number / 2 / mean for number in range(21)])
    assert found.largest_share == pytest.approx(10 / sum(weight))
    assert found.ess == pytest.approx(sum(weight) ** 2 / sum(w**2 for w in weight))
    assert found.ess_fraction == pytest.approx(found.ess / 4)


def test_calibration_bins_against_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, label = torch.rand(53, generator=generator), torch.randn(53, generator=generator)
    propensity = 0.1 + 0.9 * torch.rand(53, generator=generator)
    curve = reward_calibration(predicted, label, propensity)
    assert [part.rows for part in curve] == [27, 26]
    half = 0.5 * (float(label.max()) - float(label.min())) ** 2
    order = sorted(range(53), key=lambda row: float(predicted[row]))
    for part, members in zip(curve, (order[:27], order[27:]), strict=True):
        weight = [1 / float(propensity[row]) for row in members]
        actual = sum(w * float(label[row]) for w, row in zip(weight, members, strict=True)) / sum(weight)
        squares = sum((w * (float(label[row]) - actual)) ** 2 for w, row in zip(weight, members, strict=True))
        assert part.predicted == pytest.approx(
            sum(w * float(predicted[row]) for w, row in zip(weight, members, strict=True)) / sum(weight), rel=1e-6
        )
        assert part.actual == pytest.approx(actual, rel=1e-6)
        added = half * (sum(weight) / len(weight)) ** 2
        assert part.stderr == pytest.approx(math.sqrt(squares + added) / sum(weight), rel=1e-6)


def test_calibration_of_true_probabilities_lies_on_the_diagonal() -> None:
    x, observations, propensity, _ = log()
    seen = observations.o == 1
    label = (observations.r[seen] - RATES.rho_10) / (1 - RATES.rho_01 - RATES.rho_10)
    curve = reward_calibration(torch.sigmoid(3 * x[seen, 0]), label, propensity[seen])
    assert len(curve) == 5
    assert all(abs(part.predicted - part.actual) < 3 * part.stderr for part in curve)


def test_risk_at_the_rates_used_is_that_of_the_gate(fits: RewardFits) -> None:
    assert diagnosed(fits).rho.estimate.risk == pytest.approx(fits.risks[METHOD], rel=1e-6)


def test_preference_under_the_true_rates_is_the_true_one(fits: RewardFits) -> None:
    found = diagnosed(fits)
    truth = float(log()[3].mean())
    base = found.gamma[0]
    assert base.low == pytest.approx(base.high) == found.rho.estimate.preference
    assert base.low_95 < truth < base.high_95
    point = next(point for point in found.rho.grid if (point.rho_01, point.rho_10) == (0.0, 0.0))
    assert point.preference == pytest.approx(found.rho.estimate.preference * 0.7 + 0.1)  # feedback taken as it is
    assert [(point.rho_01, point.rho_10) for point in found.rho.grid] == [(a, b) for a in RHO_GRID for b in RHO_GRID]


def test_corners_are_those_of_the_intervals_that_are_possible(fits: RewardFits) -> None:
    noise = NoiseEstimate(RATES, (0.1, 0.3), (0.05, 0.8), 20, 20)
    assert [(point.rho_01, point.rho_10) for point in diagnosed(replace(fits, noise=noise)).rho.corners] == [
        (0.1, 0.05),
        (0.1, 0.8),
        (0.3, 0.05),
    ]
    assert diagnosed(fits).rho.corners == ()


def test_bounds_hold_the_truth_from_the_gamma_that_is_at_work() -> None:
    gamma = 3.0
    _, observations, propensity, clean = log(hidden=2 * math.log(gamma))
    bounds = {found.gamma: found for found in gamma_sensitivity(observations, propensity, RATES)}
    truth = float(clean.mean())
    assert tuple(bounds) == GAMMAS
    assert truth < bounds[1.0].low_95  # who liked it spoke up: without a doubt on the propensity, one is surely wrong
    assert bounds[gamma].low < truth < bounds[gamma].high
    assert all(found.low_95 <= found.low <= found.high <= found.high_95 for found in bounds.values())


def test_bounds_are_those_of_the_formula_for_all_rows_with_feedback() -> None:
    _, observations, propensity, _ = log()
    seen = observations.o == 1
    low, high = hidden_selection_bounds(corrected_label(observations.r[seen], RATES), propensity[seen], torch.tensor(GAMMAS))
    found = gamma_sensitivity(observations, propensity, RATES, draws=2)
    assert [bound.low for bound in found] == pytest.approx(low.tolist())
    assert [bound.high for bound in found] == pytest.approx(high.tolist())


def test_bootstrap_of_the_plain_estimate_has_its_standard_error() -> None:
    _, observations, propensity, _ = log()
    plain = gamma_sensitivity(observations, propensity, RATES, draws=1000)[0]
    seen = observations.o == 1
    label = (observations.r[seen].double() - RATES.rho_10) / (1 - RATES.rho_01 - RATES.rho_10)
    weight = 1 / propensity[seen].double()
    stderr = float((weight * (label - plain.low)).square().sum().sqrt() / weight.sum())
    assert (plain.high_95 - plain.low_95) / (2 * 1.96) == pytest.approx(stderr, rel=0.1)


def test_rows_that_a_user_repeats_make_no_interval_narrower() -> None:
    """Every row four times: as many figures of clusters as of the rows alone."""
    _, observations, propensity, _ = log()
    few = torch.arange(400)
    four = few.repeat_interleave(4)
    alone = Observations(observations.o[few], observations.r[few])
    repeated = Observations(observations.o[four], observations.r[four], four)
    for one, other in zip(
        gamma_sensitivity(alone, propensity[few], RATES), gamma_sensitivity(repeated, propensity[four], RATES), strict=True
    ):
        assert (one.low, one.high) == pytest.approx((other.low, other.high))
        assert other.high_95 - other.low_95 == pytest.approx(one.high_95 - one.low_95, rel=0.1)
    seen, seen_four = few[alone.o == 1], four[repeated.o == 1]
    label, top = corrected_label(observations.r, RATES), torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5
    one = ranking(label[seen], propensity[seen], top[seen])
    other = ranking(label[seen_four], propensity[seen_four], top[seen_four], seen_four)
    assert one is not None
    assert other is not None
    assert other.stderr == pytest.approx(one.stderr)


def test_ranking_by_hand() -> None:
    label, top = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, True, False, False, False])
    found = ranking(label, torch.full((6,), 0.5), top)
    assert found is not None
    assert found.contrast == pytest.approx(1 / 3)
    assert found.stderr == pytest.approx(math.sqrt(2 * (2 / 9 + 4 / 9) / 9))
    assert (found.gamma, found.rows) == (pytest.approx(2.0, rel=1e-5), 6)
    assert ranking(label, torch.full((6,), 0.5), torch.ones(6, dtype=torch.bool)) is None


def test_ranking_of_a_model_that_knows_the_truth_stands_and_of_a_reversed_one_falls(fits: RewardFits) -> None:
    x, observations, propensity, _ = log()
    for sign, stands in ((1, True), (-1, False)):
        found = diagnose_fit(fits, METHOD, observations, propensity, sign * 3 * x[fits.heldout, 0]).ranking
        assert found is not None
        assert (found.gamma is None or found.gamma > 1.25) == stands
        assert (found.contrast > 3 * found.stderr) == stands


def test_mechanisms_are_read_from_figures() -> None:
    figures = {"weight_label": 0.9, "weight_features": 0.1, "heldout_label": 0.5, "heldout_features": 0.52, "signal": 4.0}
    found = mechanisms({**figures, "rho_01": 0.2})
    assert found is not None
    assert found.weights == {"label": 0.9, "features": 0.1}
    assert found.heldout == {"label": 0.5, "features": 0.52}
    assert (found.adds, found.signal, found.shift, found.shift_found) == ({}, 4.0, None, None)
    evidence = mechanisms({**figures, "gain": 7.0, "strain": -2.0})
    assert evidence is not None
    assert (found.gain, found.strain, evidence.gain, evidence.strain) == (None, None, 7.0, -2.0)
    known = mechanisms({**figures, "adds_label": 3.0, "adds_features": 0.5, "shift_used": 0.2, "shift_found": 0.6})
    assert known is not None
    assert (known.adds, known.shift, known.shift_found) == ({"label": 3.0, "features": 0.5}, 0.2, 0.6)
    assert mechanisms({"rho_01": 0.2}) is None


def test_diagnostics_are_finite_json_of_a_few_kilobytes(fits: RewardFits) -> None:
    text = json.dumps(asdict(diagnosed(fits)), allow_nan=False)
    assert set(json.loads(text)) >= {"overlap", "weights", "calibration", "rho", "gamma", "ranking", "mechanisms"}
    assert len(text) < 10_000


def test_diagnostics_repeat_to_the_bit(fits: RewardFits) -> None:
    assert diagnosed(fits) == diagnosed(fits)


def test_rows_that_do_not_match_are_named(fits: RewardFits) -> None:
    _, observations, propensity, _ = log()
    with pytest.raises(ValueError, match=r"rows must match, got \{'heldout': 800, 'logit': 3\}"):
        diagnose_fit(fits, METHOD, observations, propensity, torch.zeros(3))
