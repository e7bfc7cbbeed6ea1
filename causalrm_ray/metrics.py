"""How good predictions are: each metric takes vectors [N] and returns one number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalrm_ray.checks import check_both_classes, check_finite, check_same_length, check_unit_interval


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of alike predictions: their mean prediction, their mean outcome, and how many they are."""

    predicted: float
    actual: float
    rows: int


def mse(predicted: Tensor, actual: Tensor) -> float:
    """Mean squared error of `predicted` [N] for `actual` [N]."""
    _check(predicted, actual)
    return float((predicted.double() - actual.double()).square().mean())


def mae(predicted: Tensor, actual: Tensor) -> float:
    """Mean absolute error of `predicted` [N] for `actual` [N]."""
    _check(predicted, actual)
    return float((predicted.double() - actual.double()).abs().mean())


def r2(predicted: Tensor, actual: Tensor) -> float:
    """Share of the variance explained, 1 - MSE / Var(actual): 1 is perfect, 0 no better than the mean, below 0 worse.

    Raises ValueError if `actual` [N] is constant.
    """
    _check(predicted, actual)
    return 1.0 - mse(predicted, actual) / _variance("actual", actual)


def pearson(predicted: Tensor, actual: Tensor) -> float:
    """Linear correlation in [-1, 1]. Raises ValueError if either vector is constant."""
    _check(predicted, actual)
    scale = (_variance("predicted", predicted) * _variance("actual", actual)) ** 0.5
    p, a = predicted.double(), actual.double()
    return float(((p - p.mean()) * (a - a.mean())).mean()) / scale


def auroc(score: Tensor, label: Tensor) -> float:
    """Probability that a random positive scores above a random negative, ties counted half; in [0, 1].

    `score` [N] in any unit, `label` [N] in {0, 1}. Raises ValueError if `label` holds one class only.
    """
    _check(score, label)
    check_both_classes("label", label)
    _, place, count = torch.unique(score, return_inverse=True, return_counts=True)
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
    positive = label == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    return (float(mean_rank[positive].sum()) - n1 * (n1 + 1) / 2) / (n1 * n0)


def calibration_curve(prob: Tensor, label: Tensor, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Predicted against actual in `bins` >= 1 bins of equally many rows, ordered by `prob` [N] in [0, 1]; no bin is empty."""
    _check(prob, label)
    check_unit_interval("prob", prob)
    parts = torch.argsort(prob, stable=True).tensor_split(bins)
    return tuple(
        CalibrationBin(float(prob[part].double().mean()), float(label[part].double().mean()), len(part))
        for part in parts
        if len(part)
    )


def ece(prob: Tensor, label: Tensor, bins: int = 10) -> float:
    """Expected calibration error, in probability: the row-weighted mean over bins of |mean prediction - mean outcome|.

    Bins of equal mass (Nguyen and O'Connor 2015), so that crowded regions are resolved. `prob` [N] in [0, 1], `label` [N].
    """
    curve = calibration_curve(prob, label, bins)
    return sum(part.rows * abs(part.predicted - part.actual) for part in curve) / len(prob)


def _check(predicted: Tensor, actual: Tensor) -> None:
    check_same_length(predicted=predicted, actual=actual)
    check_finite("predicted", predicted)
    check_finite("actual", actual)
    if len(predicted) == 0:
        raise ValueError("predicted must hold at least one row, got none")


def _variance(name: str, value: Tensor) -> float:
    variance = float(value.double().var(correction=0))
    if variance == 0:
        raise ValueError(f"{name} must vary, got {value[0].item():.6g} in all {len(value)} rows")
    return variance
