"""A graded data set as an observational log whose truth is known: arXiv 2603.18736, "Experimental protocol".

level -> r* (above the median)                          who likes the answer
level, or quintile of X @ w -> p = k alpha^(max - .) -> o       who gives feedback
r* with label noise -> r, where o = 1                   what reaches the log
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from causalrm_ray.checks import check_finite, check_same_length
from causalrm_ray.errors import InputError
from causalrm_ray.types import SCENARIOS, NoiseRates

Selection = Literal["label", "features"]
Score = TypeVar("Score", int, float, Tensor)
FEEDBACK_RATE = 0.2  # mean propensity
LOWEST_SCORE, HIGHEST_SCORE = 1.0, 5.0
QUINTILES = 5
_DIRECTION, _DRAWS = 1, 2  # streams of random numbers; w is the same under every seed


@dataclass(frozen=True, eq=False)
class SimulatedLog:
    """What a simulation made of N rows.

    `o` [N] in {0, 1}, was feedback given; `r` [N] in {0, 1}, the noisy feedback, 0 where o = 0. The truth, for measuring only:
    `preference` [N], r*; `propensity` [N] in (0, 1], P(o = 1) of the row given what selects; `rates` of its label noise.
    """

    o: Tensor
    r: Tensor
    preference: Tensor
    propensity: Tensor
    rates: NoiseRates


def simulate(
    levels: Tensor,
    features: Tensor,
    *,
    alpha: float,
    scenario: int | NoiseRates,
    selection: Selection,
    seed: int,
    rate: float = FEEDBACK_RATE,
) -> SimulatedLog:
    """A log of the graded rows `levels` [N] with `features` [N, D] (read only where they select).

    selection "label": p depends on the row's score, so feedback is missing not at random; "features": on the quintile of X @ w,
    so it is missing at random given x. Smaller `alpha` in (0, 1] selects more strongly; `scenario` is a key of SCENARIOS, or
    rates of its own. A seed draws the same uniforms in every setting, so that settings can be compared row by row.
    Raises ValueError for other arguments, InputError for levels that are all equal.
    """
    if not isinstance(scenario, NoiseRates) and scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {list(SCENARIOS)}, got {scenario}")
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {list(get_args(Selection))}, got {selection!r}")
    check_same_length(levels=levels, features=features)
    preference = preferences(levels, threshold(levels))
    score = rescale(levels if selection == "label" else feature_quintiles(features))
    propensity = propensities(score, alpha, rate)
    rates = scenario if isinstance(scenario, NoiseRates) else SCENARIOS[scenario]
    uniform = torch.from_numpy(np.random.default_rng([seed, _DRAWS]).random((2, len(levels))))
    o = (uniform[0] < propensity).to(torch.float32)
    flipped = uniform[1] < torch.where(preference == 1, rates.rho_01, rates.rho_10)
    r = o * torch.where(flipped, 1 - preference, preference)
    return SimulatedLog(o, r, preference, propensity.to(torch.float32), rates)


def threshold(levels: Tensor) -> float:
    """The level above which an answer is liked: the median of `levels` [N].

    Where nothing lies above the median, which is then the highest level, it is the level next below, so that only the highest is
    liked. Raises InputError if all levels are equal.
    """
    check_finite("levels", levels)
    known = levels.unique()
    if len(known) < 2:
        raise InputError(f"levels must hold at least two values, got {known.tolist()} in {len(levels)} rows")
    return float(torch.minimum(levels.median(), known[-2]))


def preferences(levels: Tensor, above: float) -> Tensor:
    """r* [N] in {0, 1}: 1 where the level lies above `above`."""
    return (levels > above).to(torch.float32)


def rescale(levels: Tensor) -> Tensor:
    """Levels [N], at least two different ones, mapped linearly to scores 1..5, [N] of double precision."""
    low, high = levels.double().min(), levels.double().max()
    return LOWEST_SCORE + (levels.double() - low) * (HIGHEST_SCORE - LOWEST_SCORE) / (high - low)


def propensities(score: Tensor, alpha: float, rate: float = FEEDBACK_RATE) -> Tensor:
    """P(o = 1) [N] of rows with `score` [N]:

        p_i = min(1, k alpha^(max score - score_i)),   mean p = `rate` in (0, 1)

    k is exact. Values reach 1 only where rows of the highest scores are rarer than `rate`; k is then larger.
    Raises ValueError for an alpha outside (0, 1] or a rate outside (0, 1).
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate}")
    weight = selection_weight(score.double(), alpha, float(score.max()))
    return (rate_scale(weight, torch.ones_like(weight), rate) * weight).clamp(max=1.0)


def selection_weight(score: Score, alpha: float, highest: float) -> Score:
    """alpha^(highest - score), to which P(o = 1 | x) is proportional: selection by a score, none at alpha = 1, in (0, 1]."""
    return alpha ** (highest - score)


def rate_scale(weight: Tensor, share: Tensor, rate: float) -> float:
    """The k for which sum_i share_i min(1, k weight_i) = `rate`; 0 where every weight is 0.

    `weight` [N] is non-negative, `share` [N] non-negative of any scale (divided by its sum), `rate` in (0, 1).
    """
    if not weight.any():
        return 0.0
    certain = torch.zeros(len(weight), dtype=torch.bool)
    while True:  # k only grows, so a row that is certain stays so, and the loop ends within N rounds
        k = (rate * share.sum() - share[certain].sum()) / (share * weight)[~certain].sum()
        over = ~certain & (k * weight > 1)
        if not over.any():
            return float(k)
        certain |= over


def feature_quintiles(features: Tensor) -> Tensor:
    """Quintile 0..4 [N] of X @ w for `features` X [N, D], N >= 5; w [D] is standard normal, and one and the same for every D.

    Ties go by the order of the rows, so each quintile holds a fifth of them.
    """
    if features.ndim != 2 or len(features) < QUINTILES:
        raise ValueError(f"features must be [N, D] with N >= {QUINTILES}, got shape {tuple(features.shape)}")
    check_finite("features", features)
    direction = torch.from_numpy(np.random.default_rng([0, _DIRECTION]).standard_normal(features.shape[1]))
    rank = torch.empty(len(features), dtype=torch.long)
    rank[torch.argsort(features.double() @ direction, stable=True)] = torch.arange(len(features))
    return rank * QUINTILES // len(features)
