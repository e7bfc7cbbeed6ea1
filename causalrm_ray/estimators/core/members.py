"""Ensembles that cross-fit themselves: each member leaves out a fold of the rows, is measured there, and stops by it.

rows -> K folds -> member k learns from the others -> its own best epoch by its own fold -> out-of-fold outputs of every row
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.folds import fold_of
from causalrm_ray.estimators.core.linear_start import start_linear
from causalrm_ray.estimators.core.task import FitTask
from causalrm_ray.estimators.core.training import FitReport, Objective, Risk, fit, predict

LinearFit = Literal["start", "rival", "none"]


class Folds:
    """Which member may learn from which row, and which measures it.

    Each member of an ensemble of K leaves out a fold of all rows, held-out ones included, and is measured there. Where the
    task spares the held-out rows, no member learns from these and all are measured on them.
    `learn` [L] and `measure` [M] number the rows that any member learns from, and those that measure any.
    """

    def __init__(self, task: FitTask, members: int) -> None:
        everyone = torch.cat([task.train, task.heldout]).sort().values
        self.members = members
        self.learn = task.train if task.spare_heldout else everyone
        self.measure = everyone
        fold = torch.full((len(task.inputs),), -1)
        labelled = task.observations.o[self.learn] == 1
        cluster, seed = task.observations.clusters(self.learn), task.settings.seed
        if cluster is None:
            for rows in (self.learn[labelled], self.learn[~labelled]):  # folds are balanced by feedback, however little there is
                few = len(rows) < members
                fold[rows] = torch.arange(len(rows)) if few else fold_of(len(rows), members, seed)
        else:
            fold[self.learn] = fold_of(len(self.learn), members, seed, cluster, labelled)
        self._left_out = fold.unsqueeze(1) == torch.arange(members)  # [N, K]
        self._measured = self._left_out | (fold == -1).unsqueeze(1)

    def taught(self, index: Tensor) -> Tensor:
        """Mask [B, K] of the members that learn from the rows `index` [B]."""
        return ~self._left_out[index]

    def unseen(self, index: Tensor) -> Tensor:
        """Mask [B, K] of the members that never saw the rows `index` [B]."""
        return self._measured[index]

    def out_of_fold(self, value: Tensor, index: Tensor) -> Tensor:
        """Mean [B, ...] of `value` [B, K, ...] over the members that never saw each of the rows `index` [B]."""
        return mean_where(value, self.unseen(index))


def mean_where(value: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, ...] of `value` [B, K, ...] over the members that `mask` [B, K] names."""
    mask = mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
    return (value * mask).sum(1) / mask.sum(1)


class BestMembers:
    """A stopping risk that keeps each member as it was at its own lowest risk.

    `module` holds parameters of which the first axis is the member's, [K, ...]. To be called before training and once an epoch,
    on the same rows; its value is the mean over members of their lowest risks so far, which falls while any of them improves.
    """

    def __init__(self, module: nn.Module, risk: Risk, folds: Folds, task: FitTask) -> None:
        self._parameters = list(module.parameters())
        self._risk, self._folds, self._shard = risk, folds, task.shard
        self._best = torch.full((folds.members,), torch.inf)
        self._kept = [parameter.detach().clone() for parameter in self._parameters]

    def __call__(self, output: Tensor, index: Tensor) -> Tensor:
        """Risk [B] of the present `output` [B, K, ...] for the rows `index` [B]."""
        unseen = self._folds.unseen(index)
        total = self._shard.sum(torch.stack([(self._risk(output, index) * unseen).sum(0), unseen.sum(0)]))
        risk = total[0] / total[1]  # nan of a member whose fold holds none of these rows: it stays as it was
        better = risk < self._best
        self._best = torch.where(better, risk, self._best)
        for kept, parameter in zip(self._kept, self._parameters, strict=True):
            kept[better] = parameter.detach()[better]
        return self._best[self._best.isfinite()].mean().expand(len(index))

    def restore(self) -> None:
        """Give every member its own best weights."""
        with torch.no_grad():
            for kept, parameter in zip(self._kept, self._parameters, strict=True):
                parameter.copy_(kept)


@dataclass(frozen=True, eq=False)
class CrossFit:
    """How training went; and of the rows `rows` [M] that measure, the `output` [M, K, ...] and the out-of-fold `risk` [M]."""

    report: FitReport
    rows: Tensor
    output: Tensor
    risk: Tensor


def cross_fit_members(
    task: FitTask,
    module: nn.Module,
    risk: Risk,
    folds: Folds,
    rows: Tensor,
    prior: Callable[[], Tensor] = lambda: torch.zeros(()),
    linear: LinearFit = "none",
) -> CrossFit:
    """Train `module` in place, whose output [B, K, ...] `risk` maps to each member's risk [B, K], on those of `rows` that teach.

    Those of `rows` that measure decide when to stop, without `prior`, a penalty per row that the training risk bears. The
    optimum of the `linear` part (see `start_linear`; the module has a `scorer`) is where training starts, or its "rival", which
    each member becomes if training does no better.
    """
    taught, measured = folds.learn[torch.isin(folds.learn, rows)], folds.measure[torch.isin(folds.measure, rows)]
    own, rival = copy.deepcopy(module.state_dict()) if linear == "rival" else {}, {}
    if linear != "none":
        start_linear(module, task.inputs, risk, taught, folds.taught, prior, task.settings.seed)
    if linear == "rival":
        rival = copy.deepcopy(module.state_dict())
        module.load_state_dict(own)
    train = Objective(taught, lambda out, index: mean_where(risk(out, index), folds.taught(index)) + prior())
    best = BestMembers(module, risk, folds, task)
    best(predict(module, task.inputs, measured, shard=task.shard), measured)  # the start may be the best there is
    report = fit(module, task.inputs, train, Objective(measured, best), task.settings, task.shard)
    if linear == "rival":
        module.load_state_dict(rival)
        best(predict(module, task.inputs, measured, shard=task.shard), measured)
    best.restore()
    output = predict(module, task.inputs, measured, shard=task.shard)
    return CrossFit(report, measured, output, folds.out_of_fold(risk(output, measured), measured))
