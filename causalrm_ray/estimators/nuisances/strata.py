"""Observed strata of a log, on which selection may depend: traits of impressions -> stratify -> strata [N]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from causalrm_ray.checks import check_finite
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.losses.selection import DISLIKED, LIKED, outcomes

OTHER = "other"


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
