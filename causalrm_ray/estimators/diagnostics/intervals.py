"""95 % intervals of what a fit says of a log: noise rates, E[r*], and who gives feedback in each stratum.

They hold where a mechanism that the fit counts with is the right one (see selection_posterior); where the log does not show which
is, an interval reaches over both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from scipy.special import expit
from torch import Tensor

from causalrm_ray.checks import check_same_length
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.diagnostics.selection_posterior import MECHANISMS, POSSIBLE, SURE, Explained, Quantities
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate
from causalrm_ray.types import NoiseRates

RateEnds = Mapping[str, Mapping[str, float | None]]

NORMAL = NormalDist().inv_cdf(0.975)
WIDE = 3.0  # ratio of the ends of an interval of a ratio beyond which there is a warning


@dataclass(frozen=True)
class Interval:
    """An `estimate`, and `low`..`high`, where it lies with 95 %."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class FitIntervals:
    """Noise rates (None: they were given) and E[r*] over all impressions, if one of the mechanisms `assumed` is right.

    A rate's estimate is the fit's own; that of E[r*] allows for what the log says of the level of the fit's opinions.
    """

    assumed: tuple[str, ...]
    rho_01: Interval | None
    rho_10: Interval | None
    preference: Interval


@dataclass(frozen=True)
class StratumSelection:
    """Who gives feedback in one stratum of `rows` impressions, of which `feedback_share` have feedback.

    `liked` = P(o = 1 | r* = 1), `disliked` = P(o = 1 | r* = 0), and `ratio` = liked / disliked, each with a 95 % interval;
    `differ` where that of the ratio leaves out 1. `warnings` are sentences.
    """

    rows: int
    feedback_share: float
    liked: float
    disliked: float
    ratio: float
    liked_interval: tuple[float, float]
    disliked_interval: tuple[float, float]
    ratio_interval: tuple[float, float]
    differ: bool
    warnings: tuple[str, ...]


def fit_intervals(log: Explained, observations: Observations, strata: Tensor | None = None) -> FitIntervals:
    """Of the whole log; `strata` [N] as the fit was given them."""
    check_same_length(opinion=log.opinion, o=observations.o)
    groups = torch.zeros(len(observations), dtype=torch.long) if strata is None else strata
    found = _quantities(log, observations, groups, int(groups.max()) + 1)
    logits = [torch.stack([one.whole, one.errors], 1) for one in found.values()]  # [3, 2] of each mechanism
    rho_01, rho_10, preference = (_hull([(float(one[k, 0]), float(one[k, 1])) for one in logits], expit) for k in range(3))
    own = log.rates.rho_01, log.rates.rho_10
    rates = [None if log.known else _around(at, one.low / 2, one.high / 2) for at, one in zip(own, (rho_01, rho_10), strict=True)]
    return FitIntervals(tuple(found), rates[0], rates[1], preference)


def rate_ends(rates: NoiseRates, noise: NoiseEstimate | None, intervals: FitIntervals | None) -> RateEnds:
    """`rates` as JSON, {"rho_01": {"estimate", "low", "high"}, "rho_10": ...}: the ends are those of their estimate `noise`, else
    of the fit's `intervals`; None where the rates were given, or a method found them without."""
    found: dict[str, dict[str, float | None]] = {}
    for name, rate in asdict(rates).items():
        low, high = getattr(noise, f"{name}_interval") if noise else (None, None)
        if noise is None and intervals is not None and (one := getattr(intervals, name)) is not None:
            low, high = one.low, one.high
        found[name] = {"estimate": rate, "low": low, "high": high}
    return found


def draw_rates(rates: NoiseRates, ends: RateEnds, draws: int, generator: torch.Generator) -> list[NoiseRates]:
    """Rates drawn from their intervals, Gaussian on the logit; a rate without `ends` (see rate_ends) stays as it is, and draws
    whose sum is 1 or more are replaced by `rates`."""
    found = []
    for name, rate in asdict(rates).items():
        low, high = ends[name]["low"] if ends else None, ends[name]["high"] if ends else None
        if low is None or high is None:
            found.append(torch.full((draws,), rate, dtype=torch.float64))
        else:
            low, high = torch.logit(torch.tensor([low, high], dtype=torch.float64).clamp(SURE, 1 - SURE))
            noise = torch.randn(draws, generator=generator, dtype=torch.float64)
            found.append(torch.sigmoid((low + high) / 2 + noise * (high - low) / (2 * NORMAL)))
    return [NoiseRates(*pair) if sum(pair) < 1 else rates for pair in torch.stack(found, 1).tolist()]


def selection_by_stratum(
    log: Explained, observations: Observations, strata: Tensor, names: Sequence[str]
) -> dict[str, StratumSelection]:
    """P(o = 1 | r* = 1) and P(o = 1 | r* = 0) of each stratum, `strata` [N] in 0..len(names) - 1."""
    check_same_length(opinion=log.opinion, o=observations.o, strata=strata)
    if len(strata) == 0 or not 0 <= int(strata.min()) <= int(strata.max()) < len(names):
        raise ValueError(f"strata must be in 0..{len(names) - 1} and not empty, got {strata.unique().tolist()[:8]}")
    found = _quantities(log, observations, strata.long(), len(names))
    rows = torch.bincount(strata, minlength=len(names)).tolist()
    labels = torch.bincount(strata, observations.o.double(), len(names)).long().tolist()
    return {
        name: _stratum(rows[s], labels[s], [(one.on[s], one.spread[s]) for one in found.values()]) for s, name in enumerate(names)
    }


def _quantities(log: Explained, observations: Observations, groups: Tensor, number: int) -> dict[str, Quantities]:
    """By each mechanism that counts, the likeliest first."""
    names = sorted((name for name, weight in log.weights.items() if weight >= POSSIBLE), key=lambda name: -log.weights[name])
    return {name: MECHANISMS[name](log, observations, groups, number) for name in names}


def _stratum(rows: int, labels: int, found: list[tuple[Tensor, Tensor]]) -> StratumSelection:
    """One stratum of so many `rows` and `labels`, from logs [2] of its probabilities and their covariances [2, 2]."""
    contrasts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # liked, disliked, ratio
    figures = [
        _hull([(float(way @ on), max(float(way @ spread @ way), 0.0) ** 0.5) for on, spread in found], math.exp)
        for way in contrasts
    ]
    liked, disliked, ratio = figures
    warnings = []
    if labels == 0:
        warnings.append(f"no feedback on any of {rows} rows: selection is unknown here")
    elif ratio.high > WIDE * ratio.low:
        warnings.append(
            f"interval too wide: the liked get feedback {ratio.low:.2f}..{ratio.high:.2f} times as often as the disliked "
            f"({labels} of {rows} rows with feedback)"
        )
    return StratumSelection(
        rows=rows,
        feedback_share=labels / max(rows, 1),
        liked=min(liked.estimate, 1.0),
        disliked=min(disliked.estimate, 1.0),
        ratio=ratio.estimate,
        liked_interval=(min(liked.low, 1.0), min(liked.high, 1.0)),
        disliked_interval=(min(disliked.low, 1.0), min(disliked.high, 1.0)),
        ratio_interval=(ratio.low, ratio.high),
        differ=labels > 0 and not ratio.low <= 1 <= ratio.high,
        warnings=tuple(warnings),
    )


def _hull(found: Sequence[tuple[float, float]], scale: Callable[[float], float]) -> Interval:
    """Values and standard errors, the likeliest mechanism's first, on another `scale`: from the lowest end to the highest."""
    lows, highs = zip(*((value - NORMAL * error, value + NORMAL * error) for value, error in found), strict=True)
    return Interval(*(float(scale(value)) for value in (found[0][0], min(lows), max(highs))))


def _around(estimate: float, low: float, high: float) -> Interval:
    """An interval that holds the estimate."""
    return Interval(estimate, min(low, estimate), max(high, estimate))
