"""Co-teaching and CoDis: who chooses rows for whom, by what, and how many."""

from __future__ import annotations

import torch

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.methods.small_loss import Exchange, fit_small_loss
from causalrm_ray.losses.label_noise import jensen_shannon
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.types import NoiseRates

R = torch.ones(4)
FIRST = torch.tensor([3.0, 2.0, -1.0, -2.0])  # its two easy rows are 0 and 1
SECOND = torch.tensor([-3.0, 2.5, 3.5, -1.0])  # its two easy rows are 2 and 1


def exchange(discrepancy: float = 0.0, level: float = 0.5) -> Exchange:
    return Exchange(bce, R, level, ramp=2, discrepancy=discrepancy)


def test_each_network_learns_from_the_rows_that_the_other_finds_easy() -> None:
    teaching, rows = exchange(), torch.arange(4)
    teaching.begin(2)
    risk = teaching.risk(torch.stack([FIRST, SECOND], dim=1), rows)
    first, second = bce(FIRST, R), bce(SECOND, R)
    torch.testing.assert_close(risk.mean(), (first[1] + first[2]) / 2 + (second[0] + second[1]) / 2)


def test_less_is_kept_from_epoch_to_epoch() -> None:
    teaching, logit, kept = exchange(), torch.stack([FIRST, SECOND], dim=1), []
    for epoch in (1, 2, 3):
        teaching.begin(epoch)
        kept.append(int((teaching.risk(logit, torch.arange(4)) > 0).sum()))
    assert kept == [4, 3, 3]  # of 3 chosen rows each, then of 2 each: 0, 1 and 1, 2


def test_co_teaching_is_two_plain_fits_if_noise_free() -> None:
    teaching = exchange(level=0.0)
    teaching.begin(5)
    risk = teaching.risk(torch.stack([FIRST, SECOND], dim=1), torch.arange(4))
    torch.testing.assert_close(risk, bce(FIRST, R) + bce(SECOND, R))


def test_discrepancy_brings_in_rows_that_are_seen_differently() -> None:
    first, second = torch.tensor([1.0, 0.9]), torch.tensor([1.0, -3.0])
    assert float(jensen_shannon(first, second)[1]) > 0.2
    logit, rows, chosen = torch.stack([first, second], dim=1).requires_grad_(), torch.arange(2), []
    for discrepancy in (0.0, 1.0):
        teaching = exchange(discrepancy)
        teaching.begin(2)
        (gradient,) = torch.autograd.grad(teaching.risk(logit, rows).sum(), logit)
        chosen.append(gradient[:, 1].nonzero()[:, 0].tolist())  # rows that the first network chose for the second
    assert chosen == [[0], [1]]


def test_who_learned_from_easy_rows_only_is_cooled_until_held_out_feedback_is_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 4, generator=generator)
    clean = (x[:, 0] + 0.5 * torch.randn(1200, generator=generator) > 0).float()
    r = torch.where(torch.rand(1200, generator=generator) < 0.25, 1 - clean, clean)
    train, heldout = torch.arange(900), torch.arange(900, 1200)
    given = FitTask(
        lambda: FeatureScorer(4, (8,)),
        FeatureRows(x),
        Observations(torch.ones(1200), r),
        Nuisances(rates=NoiseRates(0.25, 0.25)),
        train,
        heldout,
        FitSettings(12, 0.02, 128, 12),
        bce,
    )
    fitted = fit_small_loss(given)
    assert fitted.figures["temperature"] > 1.5  # it drops a quarter of the rows, all that contradict it
    logit = predict(fitted.scorer, given.inputs, heldout)
    risks = [float(bce(logit * factor, r[heldout]).mean()) for factor in (0.8, 1.0, 1.25)]
    assert risks[1] == min(risks)
