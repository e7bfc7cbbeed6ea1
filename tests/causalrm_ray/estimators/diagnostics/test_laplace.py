"""A Gaussian about the mode of binned outcomes."""

from __future__ import annotations

import pytest
import torch

from causalrm_ray.estimators.diagnostics.laplace import Gaussian, laplace


def probabilities(theta: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(theta)
    return torch.stack([1 - share, share], -1)


def test_mode_and_spread_are_those_of_the_density_on_a_grid() -> None:
    counts = torch.tensor([[20.0, 180.0]], dtype=torch.float64)
    prior = Gaussian(torch.tensor([0.5], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64))
    found = laplace(probabilities, counts, prior, torch.zeros(1, dtype=torch.float64), 1.0)
    grid = torch.linspace(0, 4, 40001, dtype=torch.float64)
    share = torch.sigmoid(grid)
    density = 20 * (1 - share).log() + 180 * share.log() - (grid - 0.5) ** 2 / 0.8
    assert float(found.mean) == pytest.approx(float(grid[density.argmax()]), abs=1e-4)
    weight = torch.softmax(density, 0)
    spread = float((weight * (grid - (weight * grid).sum()) ** 2).sum() ** 0.5)
    assert float(found.covariance) ** 0.5 == pytest.approx(spread, rel=0.05)  # the density leans a little


def test_dispersion_counts_fewer_rows() -> None:
    prior = Gaussian(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    start, counts = torch.zeros(1, dtype=torch.float64), torch.tensor([[30.0, 60.0]], dtype=torch.float64)
    half, few = laplace(probabilities, counts, prior, start, 2.0), laplace(probabilities, counts / 2, prior, start, 1.0)
    assert torch.allclose(half.mean, few.mean)
    assert torch.allclose(half.covariance, few.covariance)


def test_quantities_of_a_gaussian_by_the_delta_method() -> None:
    gaussian = Gaussian(torch.tensor([1.0, 2.0]), torch.tensor([[0.04, 0.01], [0.01, 0.09]]))
    value, covariance = gaussian.of(lambda theta: torch.stack([theta[0] + theta[1], theta[0] * theta[1]]))
    assert value.tolist() == [3.0, 2.0]
    # slopes (1, 1) and (2, 1): 0.04 + 0.02 + 0.09, 0.08 + 0.03 + 0.09, 0.16 + 0.04 + 0.09
    assert covariance.flatten().tolist() == pytest.approx([0.15, 0.20, 0.20, 0.29])


def test_a_start_far_away_comes_to_the_same_mode() -> None:
    prior = Gaussian(torch.zeros(1, dtype=torch.float64), 4 * torch.eye(1, dtype=torch.float64))
    counts = torch.tensor([[10.0, 90.0]], dtype=torch.float64)
    near, far = (laplace(probabilities, counts, prior, torch.tensor([at], dtype=torch.float64), 1.0).mean for at in (2.0, -15.0))
    assert torch.allclose(near, far, atol=1e-4)
