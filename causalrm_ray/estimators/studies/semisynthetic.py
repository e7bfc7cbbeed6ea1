"""Is an estimate of the risk unbiased? Fixed predictions of known faults, simulated logs, and true nuisances.

    score -> prediction of a kind -> L_ideal = mean over D of l(prediction, r*)
    draws of (o, r) -> an estimator's value from O alone, less L_ideal

arXiv 2603.18736, "Semi-synthetic experiments", after Schnabel et al. 2016 and Wang et al. 2019. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from causalrm_ray.checks import check_finite, check_same_length
from causalrm_ray.estimators.core.task import Nuisances, Observations
from causalrm_ray.estimators.methods.reweighting import FORWARD_CORRECTION, REWEIGHTING, Reweighting
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.types import NoiseRates

TOP = 5  # scores run from 1 to 5


@dataclass(frozen=True)
class Bias:
    """An estimator's value for one prediction: `ideal` is L_ideal, `value` the mean over draws.

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


def to_top(score: Tensor, generator: torch.Generator, rank: int) -> Tensor:
    """The truth, but as many rows of the score of `rank` (0: lowest) as there are of the highest are predicted highest."""
    known = score.unique()
    rows = (score == known[rank]).nonzero()[:, 0]
    chosen = rows[torch.randperm(len(rows), generator=generator)[: int((score == known[-1]).sum())]]
    return score.index_fill(0, chosen, float(known[-1]))


PREDICTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "ROTATE": rotate,
    "SKEW": skew,
    "ONE": partial(to_top, rank=0),
    "FOUR": partial(to_top, rank=-2),
}
ESTIMATORS: dict[str, Reweighting] = {"f_correction": FORWARD_CORRECTION, **REWEIGHTING}


def logit_of_score(score: Tensor) -> Tensor:
    """Logit [N] of a predicted score [N] in 1..5: scores 1, 2, 3, 4, 5 mean probabilities 0.1, 0.3, 0.5, 0.7, 0.9."""
    return torch.logit((score.double() - 0.5) / TOP)


def estimate(estimator: Reweighting, logit: Tensor, observations: Observations, nuisances: Nuisances) -> float:
    """An estimator's value of the cross-entropy risk of fixed predictions `logit` [N]."""
    objective = estimator.build(observations, nuisances, bce, torch.arange(len(observations)))
    return float(objective.risk(logit[objective.rows], objective.rows).double().mean())


def bias_table(
    score: Tensor, preference: Tensor, propensity: Tensor, rates: NoiseRates, logs: Iterable[Observations]
) -> list[Bias]:
    """Every estimator's value against L_ideal, for every kind of prediction, over the draws `logs` of one population.

    `score` [N] in 1..5, `preference` [N] is r*, `propensity` [N] and `rates` are the true ones. Doubly robust estimators impute
    r*, or P(r = 1) given r* where they take feedback as true.
    Raises ValueError for rows that do not match or fewer than two draws.
    """
    check_same_length(score=score, preference=preference, propensity=propensity)
    check_finite("score", score)
    corrected = Nuisances(propensity.double(), rates, preference.double())
    as_given = replace(corrected, imputation=preference * (1 - rates.rho_01) + (1 - preference) * rates.rho_10)
    generator = torch.Generator().manual_seed(0)
    logits = {kind: logit_of_score(make(score, generator)) for kind, make in PREDICTIONS.items()}
    values: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in logits for name in ESTIMATORS}
    for observations in logs:
        check_same_length(score=score, o=observations.o)
        for kind, name in values:
            nuisances = corrected if "rates" in ESTIMATORS[name].needs else as_given
            values[kind, name].append(estimate(ESTIMATORS[name], logits[kind], observations, nuisances))
    ideal = {kind: float(bce(logit, preference.double()).mean()) for kind, logit in logits.items()}
    return [_bias(kind, name, ideal[kind], drawn) for (kind, name), drawn in values.items()]


def _bias(kind: str, name: str, ideal: float, values: Sequence[float]) -> Bias:
    if len(values) < 2:
        raise ValueError(f"logs must hold at least two draws, got {len(values)}")
    drawn = torch.tensor(values, dtype=torch.float64)
    stderr = float(drawn.std()) / len(drawn) ** 0.5 / ideal
    return Bias(kind, name, ideal, float(drawn.mean()), float(drawn.mean()) / ideal - 1, stderr, len(drawn))
