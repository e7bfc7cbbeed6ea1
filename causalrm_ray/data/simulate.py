"""A graded data set as an observational log whose truth is known: arXiv 2603.18736, "Experimental protocol".

level -> r* (above the median)                                    who likes the answer
level, features X, prompts -> weight -> p = min(1, k weight) -> o   who gives feedback
r* with label noise -> r, where o = 1                             what reaches the log

Selection by a trait and by popularity is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from causalrm_ray.checks import check_finite, check_same_length
from causalrm_ray.errors import InputError
from causalrm_ray.types import FEEDBACK_RATE, SCENARIOS, NoiseRates, Selection

Score = TypeVar("Score", int, float, Tensor)
WITHOUT_ALPHA: tuple[Selection, ...] = ("popularity", "mixed")  # selections that alpha does not matter for
LOWEST_SCORE, HIGHEST_SCORE = 1.0, 5.0
QUINTILES = 5
POPULARITY_SIGMA = 1.5  # standard deviation of log popularity
PLEASED_FACTOR = 3.0  # how much more readily the pleased give feedback under "mixed"
POPULARITY_STRATA = 3
_DIRECTION, _DRAWS, _POPULARITY = 1, 2, 3  # streams of random numbers; all but the draws are the same under every seed


@dataclass(frozen=True, eq=False)
class SimulatedLog:
    """What a simulation made of N rows.

    `o` [N] in {0, 1}, was feedback given; `r` [N] in {0, 1}, the noisy feedback, 0 where o = 0. The truth, for measuring only:
    `preference` [N], r*; `propensity` [N] in (0, 1], P(o = 1) of the row given what selects; `rates` of its label noise.
    `strata` [N] numbers from 0 the trait, or the third of popularity, that the log also carries (None: it carries none).
    """

    o: Tensor
    r: Tensor
    preference: Tensor
    propensity: Tensor
    rates: NoiseRates
    strata: Tensor | None = None


def simulate(
    levels: Tensor,
    features: Tensor,
    *,
    alpha: float | None,
    scenario: int | NoiseRates,
    selection: Selection,
    seed: int,
    rate: float = FEEDBACK_RATE,
    prompts: Tensor | None = None,
) -> SimulatedLog:
    """A log of the graded rows `levels` [N] with `features` X [N, D] and numbers of their `prompts` [N] (read where they select).

        p_i = min(1, k weight_i),   mean p = `rate` in (0, 1)

        selection     weight                                                    feedback is missing
        "label"       alpha^(5 - score)                                         not at random
        "features"    alpha^(4 - quintile of X @ w)                             at random given x
        "trait"       alpha^(5 - score) with the trait, else alpha^(score - 1)  not at random, in opposite ways
        "popularity"  popularity                                                at random given x, which says the prompt
        "mixed"       popularity, times 3 where r* = 1                          not at random

    A row has the trait where X @ w lies above its mean. Popularity is log-normal, sigma 1.5: drawn per prompt, or, without
    `prompts`, exp(1.5 z) with z the standardised X @ w2. w, w2 and the prompts' popularity are the same under every seed.
    Smaller `alpha` in (0, 1] selects more strongly; it is None only for WITHOUT_ALPHA, which do not read it. `scenario` is a
    key of SCENARIOS, or rates of its own. A seed draws the same uniforms in every setting, so that settings can be compared row
    by row.
    Raises ValueError for other arguments, InputError for levels, or features that select, that are all equal.
    """
    if not isinstance(scenario, NoiseRates) and scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {list(SCENARIOS)}, got {scenario}")
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {list(get_args(Selection))}, got {selection!r}")
    check_same_length(levels=levels, features=features, **({} if prompts is None else {"prompts": prompts}))
    preference = preferences(levels, threshold(levels))
    weight, strata = _weights(levels, preference, features, prompts, selection, alpha)
    propensity = scaled(weight, rate)
    rates = scenario if isinstance(scenario, NoiseRates) else SCENARIOS[scenario]
    uniform = torch.from_numpy(np.random.default_rng([seed, _DRAWS]).random((2, len(levels))))
    o = (uniform[0] < propensity).to(torch.float32)
    flipped = uniform[1] < torch.where(preference == 1, rates.rho_01, rates.rho_10)
    r = o * torch.where(flipped, 1 - preference, preference)
    return SimulatedLog(o, r, preference, propensity.to(torch.float32), rates, strata)


def _weights(
    levels: Tensor, preference: Tensor, features: Tensor, prompts: Tensor | None, selection: Selection, alpha: float | None
) -> tuple[Tensor, Tensor | None]:
    """What p is proportional to, [N] of double precision, and the strata [N] that the log carries (see `simulate`)."""
    if selection in WITHOUT_ALPHA:
        popular = popularity(features) if prompts is None else prompt_popularity(prompts)
        factor = torch.where(preference == 1, PLEASED_FACTOR, 1.0) if selection == "mixed" else 1.0
        return popular * factor, popularity_strata(popular)
    if alpha is None or not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if selection == "features":
        return selection_weight(feature_quintiles(features).double(), alpha, QUINTILES - 1), None
    score = rescale(levels)
    if selection == "label":
        return selection_weight(score, alpha, HIGHEST_SCORE), None
    trait = feature_trait(features)
    mirrored = LOWEST_SCORE + HIGHEST_SCORE - score  # where displeasure gives feedback
    return selection_weight(torch.where(trait == 1, score, mirrored), alpha, HIGHEST_SCORE), trait


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
    return scaled(selection_weight(score.double(), alpha, float(score.max())), rate)


def scaled(weight: Tensor, rate: float) -> Tensor:
    """P(o = 1) [N] = min(1, k weight) of rows with a non-negative `weight` [N], with the exact k of the mean `rate` in (0, 1).

    Raises ValueError for another rate.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate}")
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
    rank = torch.empty(len(features), dtype=torch.long)
    rank[torch.argsort(_along(features, _DIRECTION), stable=True)] = torch.arange(len(features))
    return rank * QUINTILES // len(features)


def feature_trait(features: Tensor) -> Tensor:
    """A binary trait [N], 1 where X @ w lies above its mean; X and w are those of `feature_quintiles`.

    Raises InputError where it is the same in all rows.
    """
    return (_standardised(features, _DIRECTION) > 0).long()


def popularity(features: Tensor) -> Tensor:
    """Popularity [N] = exp(1.5 z), z the standardised X @ w2 of `features` X [N, D]; w2 [D] is standard normal and fixed.

    Raises InputError where X @ w2 is the same in all rows.
    """
    return torch.exp(POPULARITY_SIGMA * _standardised(features, _POPULARITY))


def prompt_popularity(prompts: Tensor) -> Tensor:
    """Popularity [N] of each row's prompt, by its number in `prompts` [N]: log-normal, sigma 1.5, independent between prompts."""
    known, place = prompts.unique(return_inverse=True)
    drawn = np.random.default_rng([0, _POPULARITY]).standard_normal(len(known))
    return torch.from_numpy(np.exp(POPULARITY_SIGMA * drawn))[place]


def popularity_strata(popular: Tensor) -> Tensor:
    """Third [N] of the popularity `popular` [N], 0 the least popular; rows of equal popularity share one."""
    edges = np.quantile(popular.numpy(), np.arange(1, POPULARITY_STRATA) / POPULARITY_STRATA)
    return torch.bucketize(popular, torch.from_numpy(edges)).unique(return_inverse=True)[1]


def _along(features: Tensor, stream: int) -> Tensor:
    """X @ w [N] of double precision, for the standard normal w [D] of this stream."""
    check_finite("features", features)
    direction = torch.from_numpy(np.random.default_rng([0, stream]).standard_normal(features.shape[1]))
    return features.double() @ direction


def _standardised(features: Tensor, stream: int) -> Tensor:
    """X @ w [N] of this stream with mean 0 and standard deviation 1. Raises InputError if it is the same in all rows."""
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], got shape {tuple(features.shape)}")
    if not bool((features != features[0]).any()):
        raise InputError(f"features must differ between rows where they select, got {len(features)} equal rows")
    along = _along(features, stream)
    centred = along - along.mean()
    return centred / centred.square().mean().sqrt()
