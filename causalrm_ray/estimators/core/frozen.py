"""Fits on the frozen states of a backbone, and their distillation into one model.

rows --backbone, once--> states [N, D] --method--> ensemble of small heads --distil--> the task's own scorer

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
from causalrm_ray.estimators.core.training import Calling, FitSettings, Inputs, Objective, Shard, predict
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import Cautious, EnsembleScorer, as_scorer

SETTINGS = {  # by the rows from which on they serve; chosen on simulated logs of one data set, seeds apart from those reported
    50_000: FitSettings(10, 3e-3, 1024, 2, 0.1),  # about as many steps as the next
    10_000: FitSettings(60, 3e-3, 1024, 4, 0.1),
    2_500: FitSettings(80, 2e-3, 512, 6, 0.1),
    0: FitSettings(160, 5e-4, 128, 16, 0.1),
}
HIDDEN = 32  # units of a member
FEW, MEMBERS, MANY_MEMBERS = 2_500, 5, 20  # fewer rows than FEW are shared by more members, each of which leaves out less


def frozen_states(scorer: nn.Module, inputs: Inputs, shard: Shard) -> Tensor:
    """States [N, D] of all rows; each rank computes its slice and all get the whole."""
    as_scorer(scorer)
    return predict(Calling(scorer, "states"), inputs, shard=shard)


def with_settings(task: FitTask, rows: int) -> FitTask:
    """The task under the settings by which heads on states learn from `rows` rows: in small steps where these are few."""
    settings = next(settings for least, settings in SETTINGS.items() if rows >= least)
    return replace(task, settings=replace(settings, seed=task.settings.seed))


def on_states(task: FitTask, states: Tensor) -> FitTask:
    """The same task for heads on `states` [N, D]; every rank solves it alone."""
    members, hidden = MANY_MEMBERS if len(states) < FEW else MEMBERS, 0 if task.head == "linear" else HIDDEN
    make = partial(EnsembleScorer, states, members=members, hidden=hidden)
    return replace(task, make_scorer=make, inputs=FeatureRows(states), shard=Shard())


def distil(
    task: FitTask,
    teacher: Fitted,
    states: Tensor,
    start: nn.Module | None = None,
    caution: float = 0.0,
    level: Callable[[Tensor], Tensor] = lambda logit: logit,
) -> Fitted:
    """The task's own scorer, fitted on every training row to what `teacher` predicts from its state.

        minimise  mean over D of  bce(s(x), P_teacher(r* = 1 | x))

    Cross-entropy to a probability has the teacher's as its only minimum, so calibration is kept, unless `caution` is asked for:
    then the target is a lower bound (see `lower_logit`). Hinton et al. 2015, arXiv 1503.02531. `level` increases in the teacher's
    logits, and gives those that are taught. The student begins as `start`, an
    earlier one, or fresh: targets come from the teacher alone, so a warm start saves steps and passes on no labels that it saw.
    Ranks learn from the first one's teacher, should their arithmetic differ.
    """
    scorer = Cautious(teacher.scorer, caution) if caution else teacher.scorer
    teaching = torch.sigmoid(level(predict(scorer, FeatureRows(states))))
    target = task.shard.sum(teaching if task.shard.rank == 0 else torch.zeros_like(teaching))
    student = task.scorer() if start is None else copy.deepcopy(start)
    report = task.minimise(student, lambda rows: Objective(rows, lambda logit, index: bce(logit, target[index])))
    return replace(teacher, scorer=student, report=report)
