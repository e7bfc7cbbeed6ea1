"""The level from judged rows: the formula against scipy and by hand, shrinkage, intervals, what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from causalrm_ray.errors import InputError
from causalrm_ray.estimators.nuisances.level import Level, fit_level


def sample(rows: int, shift: float, slope: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels that are drawn at another level."""
    generator = torch.Generator().manual_seed(seed)
    logit = 1.5 * torch.randn(rows, generator=generator) - 0.5
    return logit, (torch.rand(rows, generator=generator) < torch.sigmoid(Level(shift, slope)(logit))).float()


def posterior(at: np.ndarray, f: Tensor, y: Tensor, w: Tensor) -> float:
    """Minus the log density, up to a constant, as its formula is written."""
    a, b = at
    centre = float((f * w).sum() / w.sum())
    z = centre + a + np.exp(b) * (f.numpy() - centre)
    likelihood = -(w.numpy() * np.logaddexp(0, np.where(y.numpy() == 1, -z, z))).sum()
    return float(-likelihood + a**2 / (2 * 0.5**2) + b**2 / (2 * 0.25**2))


def curvature(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Second derivatives by central differences; their error of step^2 is far below what the test allows."""
    d = step * np.eye(len(at))

    def second(i: int, j: int) -> float:
        corners = [sign * other * function(at + sign * d[i] + other * d[j]) for sign in (1, -1) for other in (1, -1)]
        return sum(corners) / (4 * step**2)

    return np.array([[second(i, j) for j in range(len(at))] for i in range(len(at))])


def test_the_level_is_what_a_general_optimiser_finds() -> None:
    f, y = (value.double() for value in sample(400, 0.6, 2.0))
    weight = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    level, report = fit_level(f, y, weight)
    scaled = weight * weight.sum() / weight.square().sum()
    found = minimize(posterior, np.zeros(2), args=(f, y, scaled), method="BFGS", options={"gtol": 1e-9})
    assert (report.level.shift, report.level.slope) == pytest.approx((level.shift, level.slope))
    assert (report.shift, math.log(level.slope)) == pytest.approx(found.x, abs=1e-5)
    assert report.slope_stderr is not None
    errors = np.linalg.inv(curvature(lambda at: posterior(at, f, y, scaled), found.x)).diagonal() ** 0.5
    # Ours are by the expected curvature: of 400 rows the observed one differs from it by a few per cent.
    assert (report.shift_stderr, report.slope_stderr / level.slope) == pytest.approx(errors, rel=0.1)
    assert report.effective_rows == pytest.approx(float(scaled.sum()))
    assert report.effective_rows < 400


def test_a_shift_by_hand() -> None:
    """Ten rows at logit 0, seven liked: 7 - 10 s(a) = 4 a."""
    level, report = fit_level(torch.zeros(10), torch.tensor([1.0] * 7 + [0.0] * 3))
    assert 7 - 10 / (1 + math.exp(-level.shift)) == pytest.approx(4 * level.shift, abs=1e-6)
    share = 1 / (1 + math.exp(-level.shift))
    assert report.shift_stderr == pytest.approx((10 * share * (1 - share) + 4) ** -0.5)
    assert (report.rows, report.effective_rows, report.slope, report.slope_stderr) == (10, 10.0, 1.0, None)
    assert (report.liked, report.mean_before) == (pytest.approx(0.7), 0.5)
    assert report.liked_stderr == pytest.approx((0.21 / 9) ** 0.5)
    assert report.loss_before == pytest.approx(math.log(2))


def test_few_rows_move_the_level_less_than_many() -> None:
    shifts = [fit_level(torch.zeros(rows), (torch.arange(rows) % 10 < 8).float())[0].shift for rows in (10, 40, 160, 10_000)]
    assert shifts == sorted(shifts)
    assert shifts[0] < 0.75 * math.log(4)
    assert shifts[-1] == pytest.approx(math.log(4), abs=1e-2)


def test_a_slope_is_used_only_where_it_predicts_better() -> None:
    level, report = fit_level(*sample(400, 0.0, 2.5))
    assert level.slope > 1.5
    assert report.loss_after < report.loss_before
    plain = [fit_level(*sample(400, 0.5, 1.0, seed))[0].slope for seed in range(20)]
    assert sum(slope == 1 for slope in plain) >= 10
    assert all(abs(math.log(slope)) < 0.35 for slope in plain)


def test_intervals_of_shift_and_share_cover_what_is_true() -> None:
    """In 200 samples of 100 rows, from 92 to 98 % of the 95 % intervals: three standard errors of 200 draws are 4.6 %."""
    covered = {"shift": 0, "share": 0}
    for seed in range(200):
        _, report = fit_level(*sample(100, 0.5, seed=seed + 1000))
        covered["shift"] += abs(report.shift - 0.5) <= 1.96 * report.shift_stderr
        covered["share"] += abs(report.liked - 0.5) <= 1.96 * report.liked_stderr  # logits are symmetric about 0 then
    assert all(0.92 <= count / 200 <= 0.98 for count in covered.values()), covered


def test_rows_of_a_cluster_share_a_fold_and_widen_the_error_of_means() -> None:
    f, y = sample(50, 0.5)
    twice = torch.arange(50).repeat(2)
    _, once = fit_level(f, y)
    _, report = fit_level(f.repeat(2), y.repeat(2), cluster=twice)
    assert report.liked_stderr == pytest.approx(once.liked_stderr)
    assert report.shift_stderr < once.shift_stderr
    _, apart = fit_level(f.repeat(2), y.repeat(2))
    assert apart.liked_stderr < 0.8 * report.liked_stderr


def test_predictions_after_are_cross_fitted() -> None:
    """One row that is liked among four of the other kind: its own label cannot help it."""
    y = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    level, report = fit_level(torch.zeros(5), y)
    inside = float(torch.sigmoid(torch.tensor(level.shift)))
    by_hand = []
    for row in range(5):
        other, _ = fit_level(torch.zeros(4), torch.cat([y[:row], y[row + 1 :]]))
        by_hand.append(1 / (1 + math.exp(-other.shift)))
    assert report.mean_after == pytest.approx(np.mean(by_hand))
    assert report.loss_after == pytest.approx(-np.mean([math.log(by_hand[0]), *(math.log(1 - one) for one in by_hand[1:])]))
    assert by_hand[0] < inside < by_hand[1]


@pytest.mark.parametrize(
    ("f", "y", "parts"),
    [
        (torch.zeros(20), (torch.arange(20) % 4 == 0).float(), ["Only 20 rows were judged", "30 at least"]),
        (torch.zeros(60), torch.ones(60), ["All 60 judged rows are liked", "only the prior bounds the shift"]),
        (*sample(100, 0.0, seed=4), ["do not lower the model's log loss", "is used anyway"]),
        (torch.full((400,), 60.0), (torch.arange(400) % 20 == 0).float(), ["still says", "more than 2 standard errors"]),
    ],
)
def test_what_is_weak_is_said(f: Tensor, y: Tensor, parts: list[str]) -> None:
    _, report = fit_level(f, y)
    assert all(part in " ".join(report.warnings) for part in parts), report
    assert not fit_level(*sample(200, 0.8))[1].warnings


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="clean labels must be of at least 2 rows, got 1"):
        fit_level(torch.zeros(1), torch.ones(1))
    with pytest.raises(InputError, match="at least 2 users, conversations or prompts, got 1"):
        fit_level(torch.zeros(4), torch.ones(4), cluster=torch.zeros(4))
    with pytest.raises(ValueError, match="rows must match"):
        fit_level(torch.zeros(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"label must be 0 or 1, got 0\.5 at position 1"):
        fit_level(torch.zeros(2), torch.tensor([0.0, 0.5]))
