"""Label Wave: early stopping by how much the predictions on the training rows still change, without any label held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import FitTask, Fitted, Need
from causalrm_ray.estimators.core.training import Objective
from causalrm_ray.estimators.methods.observed import minimise, observed, plain_risk
from causalrm_ray.losses.label_noise import fluctuation


class PredictionChanges:
    """Share of the last `window` epochs in which each row's predicted class changed.

    A stopping risk: called once an epoch, on the same rows every time. In the first epoch all predictions count as changed.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._past: list[Tensor] = []

    def __call__(self, logit: Tensor, index: Tensor) -> Tensor:
        """Risk [M] of this epoch's `logit` [M]."""
        past = self._past or [logit <= 0]
        self._past = [*past, logit > 0][-self._window - 1 :]
        return fluctuation(torch.stack(self._past))


@dataclass(frozen=True)
class LabelWave:
    """The plain loss on rows with feedback, stopped at the first minimum of the moving average of prediction changes.

    A minimum is one that the settings' patience does not undercut. Only training rows are watched and the held-out rows are not
    read, though they are not trained on either. `window` epochs are averaged.
    """

    paper: str = "Yuan et al. 2024, arXiv 2502.07551"
    window: int = 3
    needs: frozenset[Need] = frozenset()

    def fit(self, task: FitTask) -> Fitted:
        """A scorer as it was when its predictions changed least."""
        scorer, rows = task.scorer(), observed(task, task.train)
        watch = Objective(rows, PredictionChanges(self.window))
        report = minimise(task, scorer, Objective(rows, plain_risk(task)), watch)
        return Fitted(scorer, report, {"changes": report.best.validation_risk})


LABELWAVE = LabelWave()
