"""Moments of a stream of numbers that arrives in parts, and numbers in their units."""

from __future__ import annotations

from typing import NamedTuple

import torch

from causalrm_ray.checks import check_finite

EPSILON = 1e-8  # variance below which all numbers count as equal


class RunningMoments(NamedTuple):
    """Count of the numbers seen, their mean, and their summed squared distance from it; float64, exact through JSON."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_values(self, values_N: torch.Tensor) -> RunningMoments:
        """The moments of the numbers seen so far and `values_N` [N] together.

        mean = mean_a + d n_b / n,   squares = squares_a + squares_b + d^2 n_a n_b / n,   d = mean_b - mean_a

        No large sums are subtracted, so a far-off mean costs no digits. Chan, Golub and LeVeque 1983, eq. 2.1; Welford's
        rule for N = 1. Raises ValueError for numbers that are not finite.
        """
        check_finite("values", values_N)
        if len(values_N) == 0:
            return self
        values = values_N.double()
        other, mean = len(values), float(values.mean())
        squares = float((values - mean).square().sum())
        total, apart = self.count + other, mean - self.mean
        return RunningMoments(
            total,
            self.mean + apart * other / total,
            self.squares + squares + apart * apart * self.count * other / total,
        )

    @property
    def variance(self) -> float:
        """Population variance; 0 before the first number."""
        return self.squares / self.count if self.count else 0.0

    def normalise(self, values_N: torch.Tensor) -> torch.Tensor:
        """(x - mean) / sqrt(variance + 1e-8), [N] float64."""
        return (values_N.double() - self.mean) / (self.variance + EPSILON) ** 0.5
