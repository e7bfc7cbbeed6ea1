"""Propensities: honest out of fold, calibrated, clipped, diagnosed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.folds import fold_of
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, Objective, predict
from causalrm_ray.estimators.nuisances.calibration import Calibration, cross_calibrate, fit_calibration
from causalrm_ray.estimators.nuisances.propensity import (
    calibrate,
    cross_fit,
    cross_fit_logits,
    diagnose,
    effective_sample_size,
    lowest_weighted,
    split_rows,
)
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import FeatureScorer

SETTINGS = FitSettings(epochs=8, lr=0.05, batch_size=256)


def feedback(rows: int = 4000) -> tuple[FeatureRows, Tensor, Tensor]:
    """Features, true propensity, and what was observed."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(rows, 2, generator=generator)
    truth = torch.sigmoid(features[:, 0] - 1.5)
    return FeatureRows(features), truth, (torch.rand(rows, generator=generator) < truth).float()


def test_cross_fit_and_calibrate_recover_the_true_propensity() -> None:
    inputs, truth, o = feedback()
    raw, modules = cross_fit(lambda: FeatureScorer(2, ()), inputs, o, replace(SETTINGS, seed=1))
    propensity = calibrate(raw, o, clip=0.02)
    assert len(modules) == 2
    assert float((propensity.prob - truth).abs().mean()) < 0.03
    assert propensity.report.ece < 0.03
    assert propensity.report.mean == pytest.approx(float(o.mean()), abs=0.02)
    assert propensity.report.warnings == ()


@pytest.mark.parametrize("number", [0, 1])
def test_no_row_is_predicted_by_a_model_that_trained_on_it(number: int) -> None:
    inputs, _, o = feedback(200)
    rows, _ = split_rows(torch.arange(200), 0.1, 2)
    fold = torch.full((200,), -1)
    fold[rows] = fold_of(180, 2, 2)
    raw, _ = cross_fit(lambda: FeatureScorer(2, ()), inputs, o, replace(SETTINGS, seed=2))
    flipped, _ = cross_fit(lambda: FeatureScorer(2, ()), inputs, torch.where(fold == number, 1 - o, o), replace(SETTINGS, seed=2))
    assert torch.equal(raw[fold == number], flipped[fold == number])
    assert not torch.equal(raw[fold == 1 - number], flipped[fold == 1 - number])


def test_rows_of_no_fold_get_the_mean_of_all_modules() -> None:
    inputs, _, o = feedback(200)
    rows, held_out, rest = torch.arange(100), torch.arange(100, 150), torch.arange(100, 200)

    def objective(index: Tensor) -> Objective:
        return Objective(index, lambda logit, number: bce(logit, o[number]))

    task = FitTask(lambda: FeatureScorer(2, ()), inputs, Observations(o, o), Nuisances(), rows, held_out, SETTINGS, bce)
    logit, modules = cross_fit_logits(task, objective, rows, 3)
    assert len(modules) == 3
    torch.testing.assert_close(logit[rest], sum(predict(module, inputs, rest) for module in modules) / 3)


def test_isotonic_calibration_by_hand() -> None:
    # pooled: rows 1 and 2 violate the order, so both get 1/2
    calibration = fit_calibration(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(
        calibration(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.35, 0.9])), torch.tensor([0, 0, 0.5, 0.5, 0.75, 1])
    )


def test_calibration_survives_json() -> None:
    calibration = fit_calibration(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 1.0, 1.0]))
    again = Calibration(**json.loads(json.dumps(asdict(calibration))))
    probe = torch.linspace(0, 1, 11)
    assert torch.equal(again(probe), calibration(probe))


def test_cross_calibration_error_is_honest() -> None:
    # a raw score without information: calibrated on itself it looks sharp, out of fold it does not
    generator = torch.Generator().manual_seed(0)
    raw, o = torch.rand(400, generator=generator), (torch.rand(400, generator=generator) < 0.3).float()
    everywhere = torch.ones(400, dtype=torch.bool)
    dishonest = diagnose(fit_calibration(raw, o)(raw), o, 0.01)
    honest = diagnose(cross_calibrate(raw, o, everywhere, 5, 0), o, 0.01)
    assert dishonest.auroc > 0.55
    assert honest.auroc < 0.55
    assert dishonest.ece < honest.ece


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(torch.ones(7)) == pytest.approx(7.0)
    assert effective_sample_size(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(36 / 14)
    assert effective_sample_size(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="weight must be >= 0 and not all zero"):
        effective_sample_size(torch.zeros(3))


def test_report_by_hand() -> None:
    prob, o = torch.tensor([0.01, 0.5, 0.5, 0.25]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    report = diagnose(prob, o, clip=0.1)
    assert (report.rows, report.observed, report.clipped_share) == (4, 2, 0.25)
    assert report.ess == pytest.approx((2 + 4) ** 2 / (4 + 16))
    assert report.ess_fraction == pytest.approx(0.9)
    assert report.mean == pytest.approx((0.01 + 0.5 + 0.5 + 0.25) / 4)
    assert report.mean_weight == pytest.approx((2 + 4) / 4)
    assert report.ece == pytest.approx((0.01 + 0.5 + 0.5 + 0.75) / 4)  # each row is a bin
    assert report.overlap[0] == pytest.approx(0.01)
    assert report.overlap[-1] == 0.5
    assert any("25% of the propensities lie below the clip" in warning for warning in report.warnings)
    json.dumps(asdict(report))


def test_where_feedback_is_rare_the_default_clip_touches_few_rows_and_keeps_the_weights_whole() -> None:
    rng = torch.Generator().manual_seed(3)
    raw = 0.08 * torch.exp(0.8 * torch.randn(40_000, generator=rng) - 0.32)  # 8 % on average
    o = torch.bernoulli(raw.clamp(max=1), generator=rng)
    absolute, relative = (calibrate(raw.clamp(max=1), o, clip).report for clip in (0.1, None))
    assert absolute.clipped_share > 0.7
    assert absolute.mean_weight < 0.75
    assert any("Lower reward.clip" in warning for warning in absolute.warnings)
    assert relative.clip == pytest.approx(float(o.mean()) / 4)
    assert relative.clipped_share < 0.15
    assert relative.mean_weight == pytest.approx(1, abs=0.05)
    assert abs(absolute.ece - relative.ece) < 1e-6  # of what was estimated, not of what is used


@pytest.mark.parametrize(("share", "lowest"), [(0.2, 0.05), (0.08, 0.02), (0.5, 0.1), (1.0, 0.1)])
def test_the_default_clip_is_a_quarter_of_the_feedback_and_at_most_the_papers(share: float, lowest: float) -> None:
    assert lowest_weighted(None, torch.ones(100) * (torch.arange(100) < round(100 * share))) == pytest.approx(lowest)
    assert lowest_weighted(0.3, torch.ones(100)) == 0.3


def test_clipping_holds_on_every_row() -> None:
    raw = torch.linspace(0, 1, 100)
    o = (raw > 0.5).float()
    propensity = calibrate(raw, o, clip=0.05)
    assert float(propensity.prob.min()) == pytest.approx(0.05)
    assert float(propensity.prob.max()) <= 1.0


def test_no_overlap_and_bad_numbers_are_named() -> None:
    inputs, _, o = feedback(100)
    for value in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"o must hold both classes, got {int(100 * value)} ones in 100 rows"):
            cross_fit(lambda: FeatureScorer(2, ()), inputs, torch.full((100,), value), SETTINGS)
    with pytest.raises(ValueError, match="raw must be finite, got nan at position 1"):
        calibrate(torch.tensor([0.5, math.nan]), torch.tensor([0.0, 1.0]), 0.1)
    with pytest.raises(ValueError, match=r"clip must be in \(0, 1\), got 0"):
        calibrate(torch.full((100,), 0.5), o, 0)
    with pytest.raises(ValueError, match=r"folds must be in 2..90 \(the rows\), got 1"):
        cross_fit(lambda: FeatureScorer(2, ()), inputs, o, SETTINGS, folds=1)
    with pytest.raises(ValueError, match="rows must match"):
        calibrate(torch.full((3,), 0.5), o, 0.1)


def test_given_folds_say_which_model_leaves_out_which_row() -> None:
    inputs, _, o = feedback(200)
    fold = torch.arange(200) % 3 - 1
    raw, modules = cross_fit(lambda: FeatureScorer(2, ()), inputs, o, FitSettings(epochs=2, lr=0.01, batch_size=50), fold=fold)
    said = torch.stack([predict(module, inputs) for module in modules])
    expected = torch.where(fold == 0, said[0], torch.where(fold == 1, said[1], said.mean(0))).sigmoid()
    torch.testing.assert_close(raw, expected, atol=1e-5, rtol=0)  # model k predicts fold k, both of the rest
    assert float((said[0] - said[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("number", [0, 1])
def test_labels_of_a_given_fold_do_not_move_what_is_said_of_it(number: int) -> None:
    inputs, _, o = feedback(200)
    fold = torch.arange(200) % 3 - 1
    raw, _ = cross_fit(lambda: FeatureScorer(2, ()), inputs, o, SETTINGS, fold=fold)
    flipped, _ = cross_fit(lambda: FeatureScorer(2, ()), inputs, torch.where(fold == number, 1 - o, o), SETTINGS, fold=fold)
    assert torch.equal(raw[fold == number], flipped[fold == number])
    assert not torch.equal(raw[fold == 1 - number], flipped[fold == 1 - number])
