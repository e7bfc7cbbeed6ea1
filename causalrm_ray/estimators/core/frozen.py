"""Fits on the frozen states of a backbone, and their distillation into one model.

states [N, D] --method--> ensemble of small heads --distil--> a whole model

From a few thousand noisy labels, small heads on good states learn more than a whole backbone does, in a second instead of
minutes; and their predictions on all rows, with feedback or without, are targets without label noise for the backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import FitTask, Fitted
from causalrm_ray.estimators.core.training import FitSettings, Objective, Shard, predict
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import EnsembleScorer

SETTINGS = {  # by the rows from which on they serve; chosen on simulated logs of one data set, seeds apart from those reported
    50_000: FitSettings(10, 3e-3, 1024, 2, 0.1),  # about as many steps as the next
    10_000: FitSettings(60, 3e-3, 1024, 4, 0.1),
    2_500: FitSettings(80, 2e-3, 512, 6, 0.1),
    0: FitSettings(160, 5e-4, 128, 16, 0.1),
}
HIDDEN = 32  # units of a member
FEW, MEMBERS, MANY_MEMBERS = 2_500, 5, 20  # fewer rows than FEW are shared by more members, each of which leaves out less


def with_settings(task: FitTask, rows: int) -> FitTask:
    """The task under the settings by which heads on states learn from `rows` rows: in small steps where these are few."""
    return replace(task, settings=head_settings(rows, task.settings.seed))


def head_settings(rows: int, seed: int) -> FitSettings:
    """How heads on states learn from `rows` rows."""
    settings = next(settings for least, settings in SETTINGS.items() if rows >= least)
    return replace(settings, seed=seed)


def make_head(states: Tensor, linear: bool = False) -> Callable[[], EnsembleScorer]:
    """What makes a fresh ensemble of heads on `states` [N, D]."""
    members, hidden = MANY_MEMBERS if len(states) < FEW else MEMBERS, 0 if linear else HIDDEN
    return partial(EnsembleScorer, states, members=members, hidden=hidden)


def on_states(task: FitTask, states: Tensor) -> FitTask:
    """The same task for heads on `states` [N, D]; every rank solves it alone."""
    make = make_head(states, task.head == "linear")
    return replace(task, make_scorer=make, inputs=FeatureRows(states), shard=Shard())


def distil(
    task: FitTask,
    teacher: Fitted,
    states: Tensor,
    start: nn.Module | None = None,
) -> Fitted:
    """The task's own scorer, fitted on every training row to what `teacher` predicts from its state in `states` [N, D].

        minimise  mean over D of  bce(s(x), P_teacher(r* = 1 | x))

    Cross-entropy to a probability has the teacher's as its only minimum, so calibration is kept. Hinton et al. 2015, arXiv
    1503.02531. The student begins as `start`, an earlier one, or fresh: targets come from the teacher alone, so a warm start
    saves steps and passes on no labels that it saw. Ranks learn from the first one's teacher, should their arithmetic differ.
    """
    teaching = torch.sigmoid(predict(teacher.scorer, FeatureRows(states)))
    target = task.shard.sum(teaching if task.shard.rank == 0 else torch.zeros_like(teaching))
    student = task.scorer() if start is None else copy.deepcopy(start)
    report = task.minimise(student, lambda rows: Objective(rows, lambda logit, index: bce(logit, target[index])))
    return replace(teacher, scorer=student, report=report)
