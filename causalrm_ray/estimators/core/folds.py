"""Folds of rows for cross-fitting."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrm_ray.errors import InputError


def fold_of(rows: int, folds: int, seed: int, cluster: Tensor | None = None, labelled: Tensor | None = None) -> Tensor:
    """Fold number in 0..folds-1 of each of `rows` rows: equally many each, at random.

    Rows of one `cluster` [rows] (a user's, say) share a fold, and folds get equally many clusters; these are dealt by their
    sizes, in the first place their `labelled` rows (a mask [rows]), so that folds are about as large.
    """
    generator = torch.Generator().manual_seed(seed)
    if cluster is None:
        if not 2 <= folds <= rows:
            raise ValueError(f"folds must be in 2..{rows} (the rows), got {folds}")
        return torch.randperm(rows, generator=generator) % folds
    _, place, size = torch.unique(cluster, return_inverse=True, return_counts=True)
    if not 2 <= folds <= len(size):
        raise InputError(
            f"rows of one user, conversation or prompt share a fold: {folds} folds need at least {folds} of these, "
            f"got {len(size)} over {rows} rows"
        )
    weight = size.double()
    if labelled is not None:
        weight = weight + torch.bincount(place, labelled.double(), minlength=len(size)) * rows  # labels first, then rows
    order = torch.randperm(len(size), generator=generator)
    order = order[torch.argsort(weight[order], descending=True, stable=True)]
    lap, step = torch.arange(len(size)) // folds, torch.arange(len(size)) % folds
    fold = torch.empty_like(order)
    fold[order] = torch.where(lap % 2 == 0, step, folds - 1 - step)  # there and back, or the first fold would get the largest
    return fold[place]
