"""Sums over clusters: rows of one user say less of the whole than as many rows of as many users."""

from __future__ import annotations

import torch
from torch import Tensor


def numbered(cluster: Tensor) -> tuple[Tensor, int]:
    """Clusters [M] numbered from 0, and how many they are."""
    found, number = torch.unique(cluster, return_inverse=True)
    return number, len(found)


def summed(residual: Tensor, cluster: Tensor | None) -> Tensor:
    """`residual` [M] added up over each `cluster` [M]; as it is where every row is one of its own.

    The squares of these sums add up to the variance of the rows' sum, where rows of different clusters are independent.
    """
    if cluster is None:
        return residual
    number, clusters = numbered(cluster)
    return torch.zeros(clusters, dtype=residual.dtype).index_add_(0, number, residual)
