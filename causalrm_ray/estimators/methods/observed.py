"""What the methods share that denoise labels: they train on the rows with feedback, as if these had been chosen at random."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.linear_start import fit_scorer
from causalrm_ray.estimators.core.task import FitTask
from causalrm_ray.estimators.core.training import FitReport, FitSettings, Inputs, Objective, Risk, fit, predict
from causalrm_ray.estimators.nuisances.calibration import temperature
from causalrm_ray.models.scorers.heads import Scorer
from causalrm_ray.types import NoiseRates


def observed(task: FitTask, rows: Tensor) -> Tensor:
    """Those of `rows` that have feedback, [M]."""
    return rows[task.observations.o[rows] == 1]


def plain_risk(task: FitTask) -> Risk:
    """The loss on the feedback as it is, of the first output where a module has several: logit [B] or [B, K] -> [B]."""

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        return task.loss(logit if logit.ndim == 1 else logit[:, 0], task.observations.r[index])

    return risk


def minimise(
    task: FitTask, module: nn.Module, train: Objective, heldout: Objective | None = None, inputs: Inputs | None = None
) -> FitReport:
    """Train `module` in place on `train`; `heldout` says when to stop (None: the plain loss on held-out rows with feedback)."""
    run = fit_scorer if heldout is None else fit  # another rule of stopping may need the whole path
    if heldout is None:
        heldout = Objective(observed(task, task.heldout), plain_risk(task), since=train.since)
    inputs = task.inputs if inputs is None else inputs
    return run(module, inputs, train, heldout, task.settings, task.shard)


def cool(task: FitTask, scorer: nn.Module) -> float:
    """The temperature under which held-out feedback is likeliest; `scorer`'s head is divided by it, in place."""
    rows = observed(task, task.heldout)
    found = temperature(predict(scorer, task.inputs, rows, shard=task.shard), task.observations.r[rows])
    with torch.no_grad():
        for parameter in cast(Scorer, scorer).head.parameters():
            parameter /= found
    return found


def given_rates(task: FitTask) -> NoiseRates:
    """The rates of the noise. Raises ValueError where none are given."""
    if task.nuisances.rates is None:
        raise ValueError("this method needs ['rates'], got no rates")
    return task.nuisances.rates


def ramp_epochs(settings: FitSettings, most: int) -> int:
    """`most` epochs, or half of those that may run where they are fewer than twice as many; one at least."""
    return max(1, min(most, settings.epochs // 2))
