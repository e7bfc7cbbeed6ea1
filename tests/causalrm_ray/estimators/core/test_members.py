"""Folds, and members that stop one by one, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.members import BestMembers, Folds, mean_where
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import FeatureScorer

TRAIN, HELD_OUT = torch.tensor([0, 1, 3, 4, 5, 7]), torch.tensor([2, 6])


def task(spare: bool = False) -> FitTask:
    observations = Observations(torch.ones(9), torch.zeros(9))
    inputs = FeatureRows(torch.zeros(9, 1))
    settings = FitSettings(1, 0.1, 4)
    make = lambda: FeatureScorer(1, ())  # noqa: E731
    return FitTask(make, inputs, observations, Nuisances(), TRAIN, HELD_OUT, settings, bce, spare_heldout=spare)


def test_every_row_is_left_out_by_one_member_and_measured_by_it_alone() -> None:
    folds = Folds(task(), 4)
    assert folds.learn.tolist() == folds.measure.tolist() == list(range(8))  # row 8 is in no part of the log
    assert folds.unseen(folds.measure).sum(1).tolist() == [1] * 8
    assert torch.equal(folds.taught(folds.learn), ~folds.unseen(folds.learn))
    assert folds.unseen(folds.measure).sum(0).tolist() == [2] * 4


def test_spared_rows_teach_no_member_and_measure_all() -> None:
    folds = Folds(task(spare=True), 3)
    assert folds.learn.tolist() == TRAIN.tolist()
    assert folds.unseen(HELD_OUT).all()
    assert folds.unseen(TRAIN).sum(1).tolist() == [1] * 6


def test_means_are_over_the_named_members() -> None:
    value = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [8.0, 80.0]]])
    mask = torch.tensor([[True, True, False]])
    assert mean_where(value, mask).tolist() == [[2.0, 20.0]]
    assert mean_where(value[:, :, 0], mask).tolist() == [2.0]


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(2, 3))


def test_each_member_keeps_its_own_best() -> None:
    module, folds = Numbers(), Folds(task(), 2)

    def risk(output: Tensor, index: Tensor) -> Tensor:
        return output

    best = BestMembers(module, risk, folds, task())
    values = []
    for epoch, risks in enumerate([(5.0, 5.0), (3.0, 6.0), (4.0, 4.0), (9.0, 8.0)]):
        with torch.no_grad():
            module.number.fill_(float(epoch))
        values.append(float(best(torch.tensor([risks] * 8), torch.arange(8)).mean()))
    assert values == pytest.approx([5.0, 4.0, 3.5, 3.5])
    best.restore()
    assert module.number.tolist() == [[1.0] * 3, [2.0] * 3]


def test_a_member_is_judged_by_the_rows_that_it_left_out() -> None:
    folds = Folds(task(), 2)
    rows = torch.arange(8)
    output = torch.where(folds.unseen(rows), 1.0, 100.0)  # bad wherever it learned
    assert float(BestMembers(Numbers(), lambda out, index: out, folds, task())(output, rows).mean()) == 1.0


def test_no_member_learns_from_a_cluster_that_measures_it() -> None:
    cluster = torch.randint(60, (600,), generator=torch.Generator().manual_seed(0))
    o = (torch.rand(600, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    everyone = torch.arange(600)
    given = replace(
        task(),
        inputs=FeatureRows(torch.zeros(600, 1)),
        observations=Observations(o, torch.zeros(600), cluster),
        train=everyone[cluster >= 12],
        heldout=everyone[cluster < 12],
    )
    folds = Folds(given, 5)
    for one in range(60):
        rows = everyone[cluster == one]
        assert len(folds.unseen(rows).unique(dim=0)) == 1
    assert folds.unseen(everyone[o == 1]).sum(0).min() > 0.15 * o.sum()
