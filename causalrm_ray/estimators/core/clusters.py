"""Sums over clusters: rows of one user say less of the whole than as many rows of as many users."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def numbered(cluster: Tensor) -> tuple[Tensor, int]:
    """Clusters [M] numbered from 0, and how many they are."""
    found, number = torch.unique(cluster, return_inverse=True)
    return number, len(found)


def summed(residual: Tensor, cluster: Tensor | None) -> Tensor:
    """`residual` [M, ...] added up over each `cluster` [M]; as it is where every row is one of its own.

    The squares of these sums add up to the variance of the rows' sum, where rows of different clusters are independent.
    """
    if cluster is None:
        return residual
    number, clusters = numbered(cluster)
    return torch.zeros(clusters, *residual.shape[1:], dtype=residual.dtype).index_add_(0, number, residual)


def stderr(value: Tensor, cluster: Tensor | None) -> Tensor:
    """The standard error [...] of the mean of `value` [M, ...]; the rows of one `cluster` [M] depend on one another."""
    total = summed(value - value.mean(0), cluster)
    return total.square().sum(0).sqrt() / len(value) * math.sqrt(len(total) / max(len(total) - 1, 1))


def in_standard_errors(value: Tensor, cluster: Tensor | None) -> Tensor:
    """The mean of `value` [M, ...] over its standard error, [...]."""
    return value.mean(0) / stderr(value, cluster).clamp_min(1e-12)
