"""Folds of rows for cross-fitting."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_of(rows: int, folds: int, seed: int) -> Tensor:
    """Fold number in 0..folds-1 of each of `rows` rows: equally many each, at random."""
    if not 2 <= folds <= rows:
        raise ValueError(f"folds must be in 2..{rows} (the rows), got {folds}")
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) % folds
