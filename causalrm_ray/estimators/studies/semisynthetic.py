"""Is an estimate of the risk unbiased? Fixed predictions of known faults, simulated logs, and true nuisances.

    score -> prediction of a kind -> L_ideal = mean over D of l(prediction, r*)
    draws of (o, r) -> an estimator's value from O alone, less L_ideal

arXiv 2603.18736, "Semi-synthetic experiments", after Schnabel et al. 2016 and Wang et al. 2019. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from causalrm_ray.checks import check_finite, check_same_length
from causalrm_ray.estimators.core.task import Need, Nuisances, Observations
from causalrm_ray.estimators.core.training import Objective
from causalrm_ray.estimators.methods.reweighting import REWEIGHTING, Build
from causalrm_ray.losses.label_noise import forward_logit
from causalrm_ray.losses.pointwise import Loss, bce
from causalrm_ray.types import NoiseRates

TOP = 5  # scores run from 1 to 5


class Estimator(Protocol):
    """What has a value for a fixed prediction: it is one risk over rows."""

    @property
    def needs(self) -> frozenset[Need]:
        """The nuisances that it reads."""
        ...

    @property
    def build(self) -> Build:
        """The risk over some rows."""
        ...


@dataclass(frozen=True)
class Bias:
    """What an estimator says of one prediction: `ideal` is L_ideal, `value` the mean over draws.

    `relative` = (value - ideal) / ideal, and `stderr` is its standard error over the `draws`.
    """

    prediction: str
    estimator: str
    ideal: float
    value: float
    relative: float
    stderr: float
    draws: int


def rotate(score: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted cyclically: each the next lower score there is, and the lowest becomes the highest."""
    known, place = score.unique(return_inverse=True)
    return known[(place - 1) % len(known)]


def skew(score: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian around the truth, wider for low scores: N(score, ((6 - score) / 2)^2), cut to 1..5."""
    noise = torch.randn(score.shape, generator=generator, dtype=score.dtype)
    return (score + noise * (TOP + 1 - score) / 2).clamp(1, TOP)


def one(score: Tensor, generator: torch.Generator) -> Tensor:
    """The truth, but as many lowest scores as there are highest ones are predicted highest."""
    return _to_top(score, 0, generator)


def four(score: Tensor, generator: torch.Generator) -> Tensor:
    """The truth, but as many second-highest scores as there are highest ones are predicted highest."""
    return _to_top(score, -2, generator)


PREDICTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"ROTATE": rotate, "SKEW": skew, "ONE": one, "FOUR": four}


class ForwardCorrection:
    """The loss of the forward-corrected prediction over the rows with feedback (Patrini et al. 2017, arXiv 1609.03683)."""

    needs: frozenset[Need] = frozenset({"rates"})

    def build(self, observations: Observations, nuisances: Nuisances, loss: Loss, rows: Tensor) -> Objective:
        """Its mean is over the rows with feedback among `rows`."""
        rates = nuisances.rates
        if rates is None:
            raise ValueError("f_correction needs rates, got none")
        seen = rows[observations.o[rows] == 1]
        return Objective(seen, lambda logit, index: loss(forward_logit(logit, rates), observations.r[index]))


ESTIMATORS: dict[str, Estimator] = {"f_correction": ForwardCorrection(), **REWEIGHTING}


def logit_of_score(score: Tensor) -> Tensor:
    """Logit [N] of a predicted score [N] in 1..5: scores 1, 2, 3, 4, 5 mean probabilities 0.1, 0.3, 0.5, 0.7, 0.9."""
    return torch.logit((score.double() - 0.5) / TOP)


def estimate(estimator: Estimator, logit: Tensor, observations: Observations, nuisances: Nuisances, loss: Loss = bce) -> float:
    """An estimator's value of the risk of fixed predictions `logit` [N]."""
    objective = estimator.build(observations, nuisances, loss, torch.arange(len(observations)))
    return float(objective.risk(logit[objective.rows], objective.rows).double().mean())


def bias_table(
    score: Tensor,
    preference: Tensor,
    propensity: Tensor,
    rates: NoiseRates,
    logs: Iterable[Observations],
    estimators: Mapping[str, Estimator] = ESTIMATORS,
    imputation: Tensor | None = None,
    loss: Loss = bce,
    seed: int = 0,
) -> list[Bias]:
    """Every estimator's value against L_ideal, for every kind of prediction, over the draws `logs` of one population.

    `score` [N] in 1..5, `preference` [N] is r*, `propensity` [N] and `rates` are the true ones. `imputation` [N] is P(r* = 1)
    as a doubly robust estimator guesses it (none: r* itself); one that takes feedback as true is given P(r = 1) of it.
    Raises ValueError for rows that do not match or fewer than two draws.
    """
    check_same_length(score=score, preference=preference, propensity=propensity)
    check_finite("score", score)
    guess = preference if imputation is None else imputation
    corrected = Nuisances(propensity.double(), rates, guess.double())
    as_given = Nuisances(propensity.double(), rates, guess * (1 - rates.rho_01) + (1 - guess) * rates.rho_10)
    generator = torch.Generator().manual_seed(seed)
    logits = {name: logit_of_score(make(score, generator)) for name, make in PREDICTIONS.items()}
    values: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in logits for name in estimators}
    for observations in logs:
        check_same_length(score=score, o=observations.o)
        for kind, name in values:
            nuisances = corrected if "rates" in estimators[name].needs else as_given
            values[kind, name].append(estimate(estimators[name], logits[kind], observations, nuisances, loss))
    ideal = {kind: float(loss(logit, preference.double()).mean()) for kind, logit in logits.items()}
    return [_bias(kind, name, ideal[kind], drawn) for (kind, name), drawn in values.items()]


def _bias(kind: str, name: str, ideal: float, values: Sequence[float]) -> Bias:
    if len(values) < 2:
        raise ValueError(f"logs must hold at least two draws, got {len(values)}")
    drawn = torch.tensor(values, dtype=torch.float64)
    stderr = float(drawn.std()) / len(drawn) ** 0.5 / ideal
    return Bias(kind, name, ideal, float(drawn.mean()), float(drawn.mean()) / ideal - 1, stderr, len(drawn))


def _to_top(score: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    known = score.unique()
    rows = (score == known[rank]).nonzero()[:, 0]
    chosen = rows[torch.randperm(len(rows), generator=generator)[: int((score == known[-1]).sum())]]
    flipped = score.clone()
    flipped[chosen] = known[-1]
    return flipped
