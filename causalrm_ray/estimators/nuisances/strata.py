"""Observed strata of a log, and how differently liked and disliked answers get feedback in each.

traits of impressions -> stratify -> strata [N] -> selection_by_stratum: P(o = 1 | r* = 1) and P(o = 1 | r* = 0) of each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalrm_ray.checks import check_finite, check_same_length
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_curve import resample
from causalrm_ray.losses.selection import DISLIKED, LIKED, MISSING, outcomes
from causalrm_ray.types import NoiseRates

OTHER = "other"
BINS = 50  # of P(r* = 1 | x) within a stratum
STEPS, RESTEPS = 1000, 400  # of expectation-maximisation, from the start and from the log's own fit
WIDE = 3.0  # ratio of the ends of an interval of the two probabilities' ratio beyond which there is a warning


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


def stratify(
    traits: Sequence[Mapping[str, str]], observations: Observations, most: int = 8, least: int = 20
) -> tuple[Tensor, tuple[str, ...]]:
    """Strata [N] that cross all traits' values, numbered from 0, the most frequent first, and their names ("style=long, ...").

    Crossings with fewer than `least` rows with feedback of either label, and the rarest beyond `most` in all, are merged into
    the last stratum, OTHER (which may itself be small). A trait that a row lacks reads "?". Raises ValueError for most < 1.
    """
    keys = sorted(set[str]().union(*traits))
    names = [", ".join(f"{key}={row.get(key, '?')}" for key in keys) or "all" for row in traits]
    crossings = {name: number for number, name in enumerate(dict.fromkeys(names))}
    crossing = torch.tensor([crossings[name] for name in names], dtype=torch.long)
    return merge_strata(crossing, tuple(crossings), observations, most, least)


def merge_strata(
    crossing: Tensor, names: Sequence[str], observations: Observations, most: int = 8, least: int = 20
) -> tuple[Tensor, tuple[str, ...]]:
    """`stratify` of rows whose `crossing` [N] of traits is numbered already, a place in `names`; of equally frequent ones the
    first comes first."""
    if most < 1 or least < 0:
        raise ValueError(f"most must be at least 1 and least at least 0, got {most} and {least}")
    if len(crossing) != len(observations):
        raise ValueError(f"rows must match, got {{'traits': {len(crossing)}, 'o': {len(observations)}}}")
    seen = outcomes(observations.o, observations.r)
    labels = torch.bincount(crossing * 3 + seen, minlength=3 * len(names)).reshape(-1, 3)
    ranked = labels.sum(1).argsort(descending=True, stable=True)
    enough = ranked[(labels[ranked][:, [LIKED, DISLIKED]].amin(1) >= least)]
    kept = enough if len(enough) == len(ranked) <= most else enough[: most - 1]
    place = torch.full((len(names),), len(kept))
    place[kept] = torch.arange(len(kept))
    found = tuple(names[number] for number in kept.tolist())
    return place[crossing], (*found, OTHER) if len(kept) < len(ranked) else found


def length_buckets(lengths: Tensor, buckets: int = 3) -> tuple[Tensor, tuple[str, ...]]:
    """A trait from `lengths` [N] >= 0, say in characters: the place [N] of each in names such as "up to 80", "81 to 200", "over
    200", of about equally many rows.

    Equal lengths share a bucket, so there may be fewer than `buckets` >= 1.
    """
    check_finite("lengths", lengths.double())
    if buckets < 1 or (len(lengths) and int(lengths.min()) < 0):
        raise ValueError(f"buckets must be at least 1 and lengths at least 0, got {buckets} and {lengths.min().item()}")
    edges = np.unique(np.quantile(lengths.numpy(), np.arange(1, buckets) / buckets, method="lower"))
    edges = edges[edges < int(lengths.max())].tolist()
    lows = ["up to"] + [f"{low + 1:.0f} to" for low in edges[:-1]]
    names = [f"{low} {high:.0f}" for low, high in zip(lows, edges, strict=False)]
    names.append(f"over {edges[-1]:.0f}" if edges else "any")
    return torch.bucketize(lengths, torch.tensor(edges, dtype=lengths.dtype)), tuple(names)


def selection_by_stratum(
    f: Tensor,
    observations: Observations,
    strata: Tensor,
    names: Sequence[str],
    rates: NoiseRates,
    draws: int = 300,
    seed: int = 0,
) -> dict[str, StratumSelection]:
    """Two probabilities of feedback per stratum, by maximum likelihood of MISSING, DISLIKED and LIKED.

        P(LIKED | x)    = liked e (1 - rho_01) + disliked (1 - e) rho_10,     e = sigmoid(f) = P(r* = 1 | x)
        P(DISLIKED | x) = liked e rho_01       + disliked (1 - e) (1 - rho_10)

    `f` [N] are logits of P(r* = 1 | x), calibrated over all impressions and out of fold; `strata` [N] in 0..len(names) - 1.
    Counts in bins of f within each stratum are fitted by expectation-maximisation, and again for `draws` resamples of the rows,
    or of their clusters; the uncertainty of f and `rates` is not in the intervals. Within a stratum selection depends on the
    opinion only.
    """
    check_same_length(f=f, o=observations.o, strata=strata)
    check_finite("f", f)
    if len(strata) == 0 or not 0 <= int(strata.min()) <= int(strata.max()) < len(names):
        raise ValueError(f"strata must be in 0..{len(names) - 1} and not empty, got {strata.unique().tolist()[:8]}")
    outcome = outcomes(observations.o, observations.r)
    counts, sure, cell = _cells(torch.sigmoid(f.double()), outcome, strata.long(), len(names))
    point = _fit(counts[None], sure, rates, None, STEPS)
    drawn = _fit(resample(counts, draws, seed, cell, observations.cluster), sure, rates, point, RESTEPS)
    return {name: _figures(counts[s], point[0, s], drawn[:, s]) for s, name in enumerate(names)}


def _cells(sure: Tensor, outcome: Tensor, strata: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [S, B, 3] per stratum, bin of equally many rows, and outcome; the mean of `sure` [S, B] in each; the place [N] of
    each row in the first."""
    order = torch.argsort(sure)
    order = order[torch.argsort(strata[order], stable=True)]
    sizes = torch.bincount(strata, minlength=number)
    within = torch.empty_like(strata)
    within[order] = torch.arange(len(strata)) - (sizes.cumsum(0) - sizes)[strata[order]]
    cell = strata * BINS + within * BINS // sizes[strata]
    counts = torch.bincount(cell * 3 + outcome, minlength=number * BINS * 3).reshape(number, BINS, 3).double()
    total = torch.zeros(number * BINS, dtype=torch.float64).index_add_(0, cell, sure).reshape(number, BINS)
    return counts, total / counts.sum(-1).clamp_min(1), cell * 3 + outcome


def _fit(counts: Tensor, sure: Tensor, rates: NoiseRates, start: Tensor | None, steps: int) -> Tensor:
    """(liked, disliked) [D, S, 2] for `counts` [D, S, B, 3], given P(r* = 1 | x) [S, B]."""
    share = counts[..., [DISLIKED, LIKED]].sum((-1, -2)) / counts.sum((-1, -2)).clamp_min(1)
    on = (share.clamp(0.01, 0.99)[..., None] if start is None else start).expand(*share.shape, 2)
    for _ in range(steps):
        liked, disliked = sure * on[..., :1], (1 - sure) * on[..., 1:]  # P(o = 1, r*) [D, S, B]
        posterior = {}  # P(r* = 1 | outcome, x)
        for outcome, one, zero in (
            (MISSING, sure - liked, 1 - sure - disliked),
            (DISLIKED, liked * rates.rho_01, disliked * (1 - rates.rho_10)),
            (LIKED, liked * (1 - rates.rho_01), disliked * rates.rho_10),
        ):
            posterior[outcome] = one / (one + zero).clamp_min(1e-12)
        ones = torch.stack([(counts[..., k] * posterior[k]).sum(-1) for k in (MISSING, DISLIKED, LIKED)], -1)
        zeros = counts.sum(-2) - ones  # expected rows of r* = 0 per outcome [D, S, 3]
        seen = torch.stack([rows[..., [DISLIKED, LIKED]].sum(-1) / rows.sum(-1).clamp_min(1e-12) for rows in (ones, zeros)], -1)
        on = seen.clamp(1e-6, 1 - 1e-6)
    return on


def _figures(counts: Tensor, point: Tensor, drawn: Tensor) -> StratumSelection:
    """One stratum's `counts` [B, 3], probabilities [2] and resampled ones [D, 2] as figures."""
    rows, labels = int(counts.sum()), int(counts[:, [DISLIKED, LIKED]].sum())
    values = torch.cat([drawn, drawn[:, :1] / drawn[:, 1:]], 1)
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
    warnings = []
    if labels == 0:
        warnings.append(f"no feedback on any of {rows} rows: selection is unknown here")
    elif high[2] > WIDE * low[2]:
        warnings.append(
            f"interval too wide: the liked get feedback {low[2]:.2f}..{high[2]:.2f} times as often as the disliked "
            f"({labels} of {rows} rows with feedback)"
        )
    intervals = list(zip(low, high, strict=True))
    return StratumSelection(
        rows=rows,
        feedback_share=labels / max(rows, 1),
        liked=float(point[0]),
        disliked=float(point[1]),
        ratio=float(point[0] / point[1]),
        liked_interval=intervals[0],
        disliked_interval=intervals[1],
        ratio_interval=intervals[2],
        differ=labels > 0 and not low[2] <= 1 <= high[2],
        warnings=tuple(warnings),
    )
