"""What the methods share that denoise labels: they train on the rows with feedback, as if these had been chosen at random."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.calibration import temperature
from causalrm_ray.estimators.fit import FitReport, FitSettings, Inputs, Objective, Risk, fit, predict
from causalrm_ray.estimators.problem import Problem
from causalrm_ray.models.heads import Scorer
from causalrm_ray.types import NoiseRates


def observed(problem: Problem, rows: Tensor) -> Tensor:
    """Those of `rows` that have feedback, [M]."""
    return rows[problem.observations.o[rows] == 1]


def plain_risk(problem: Problem) -> Risk:
    """The loss on the feedback as it is, of the first output where a module has several: logit [B] or [B, K] -> [B]."""

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        return problem.loss(logit if logit.ndim == 1 else logit[:, 0], problem.observations.r[index])

    return risk


def minimise(
    problem: Problem, module: nn.Module, train: Objective, heldout: Objective | None = None, inputs: Inputs | None = None
) -> FitReport:
    """Train `module` in place on `train`; `heldout` says when to stop (none: the plain loss on held-out rows with feedback)."""
    if heldout is None:
        heldout = Objective(observed(problem, problem.heldout), plain_risk(problem), since=train.since)
    inputs = problem.inputs if inputs is None else inputs
    return fit(module, inputs, train, heldout, problem.settings, problem.shard, problem.on_epoch)


def cool(problem: Problem, scorer: nn.Module) -> float:
    """The temperature under which held-out feedback is likeliest; `scorer`'s head is divided by it, in place."""
    rows = observed(problem, problem.heldout)
    found = temperature(predict(scorer, problem.inputs, rows, shard=problem.shard), problem.observations.r[rows])
    with torch.no_grad():
        for parameter in cast(Scorer, scorer).head.parameters():
            parameter /= found
    return found


def given_rates(problem: Problem) -> NoiseRates:
    """The rates of the noise. Raises ValueError where none are given."""
    if problem.nuisances.rates is None:
        raise ValueError("this method needs ['rates'], got no rates")
    return problem.nuisances.rates


def ramp_epochs(settings: FitSettings, most: int) -> int:
    """`most` epochs, or half of those that may run where they are fewer than twice as many; one at least."""
    return max(1, min(most, settings.epochs // 2))
