"""Metrics against hand numbers."""

from __future__ import annotations

import math

import pytest
import torch

from causalrm_ray import metrics

PREDICTED = torch.tensor([0.1, 0.4, 0.6, 0.9])
ACTUAL = torch.tensor([0.0, 1.0, 0.0, 1.0])


def test_quantiles_are_torchs_and_more_rows_than_it_takes_are_no_limit() -> None:
    value = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    at = [0.0, 0.03, 0.5, 0.97, 1.0]
    assert metrics.quantiles(value, at) == pytest.approx(
        torch.quantile(value.double(), torch.tensor(at, dtype=torch.float64)).tolist()
    )
    assert metrics.quantiles(torch.arange(2**24 + 1), [0.5]) == [2**23]


def test_errors_equal_hand_values() -> None:
    assert metrics.mse(PREDICTED, ACTUAL) == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert metrics.mae(PREDICTED, ACTUAL) == pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4)
    assert metrics.r2(PREDICTED, ACTUAL) == pytest.approx(1 - 0.185 / 0.25)
    assert metrics.pearson(PREDICTED, ACTUAL) == pytest.approx(0.075 / math.sqrt(0.085 * 0.25))


def test_auroc_counts_pairs_and_halves_ties() -> None:
    assert metrics.auroc(PREDICTED, ACTUAL) == pytest.approx(3 / 4)
    assert metrics.auroc(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])) == pytest.approx(3 / 4)
    assert metrics.auroc(torch.zeros(4), ACTUAL) == pytest.approx(0.5)


def test_ece_by_hand() -> None:
    # two bins of two rows: |0.25 - 0.5| and |0.75 - 0.5|
    assert metrics.ece(PREDICTED, ACTUAL, bins=2) == pytest.approx(0.25)
    curve = metrics.calibration_curve(PREDICTED, ACTUAL, bins=2)
    assert [(part.actual, part.rows) for part in curve] == [(0.5, 2), (0.5, 2)]
    assert curve[0].predicted == pytest.approx(0.25)
    # more bins than rows: each row is a bin, (0.1 + 0.6 + 0.6 + 0.1) / 4
    assert metrics.ece(PREDICTED, ACTUAL, bins=10) == pytest.approx(0.35)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="label must hold both classes, got 4 ones in 4 rows"):
        metrics.auroc(PREDICTED, torch.ones(4))
    with pytest.raises(ValueError, match="actual must vary, got 1 in all 4 rows"):
        metrics.r2(PREDICTED, torch.ones(4))
    with pytest.raises(ValueError, match="predicted must be finite, got nan at position 0"):
        metrics.mse(torch.tensor([math.nan]), torch.zeros(1))
    with pytest.raises(ValueError, match="rows must match"):
        metrics.mae(PREDICTED, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one row"):
        metrics.mae(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"prob must be in \[0, 1\]"):
        metrics.ece(torch.tensor([1.5]), torch.zeros(1))


def test_the_better_half_of_scores_with_ties_is_the_part_nearest_to_half() -> None:
    assert metrics.better_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [False, False, True, True]
    # none is above the median
    assert metrics.better_half(torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0])).tolist() == [False, False, True, True, True]
    assert metrics.better_half(torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0])).tolist() == [False, False, False, True, True]
