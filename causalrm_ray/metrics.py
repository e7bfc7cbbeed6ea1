"""How good predictions are: each metric takes vectors [N] and returns one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score, roc_auc_score
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
    return float(mean_squared_error(*_vectors(predicted, actual)))


def mae(predicted: Tensor, actual: Tensor) -> float:
    """Mean absolute error of `predicted` [N] for `actual` [N]."""
    return float(mean_absolute_error(*_vectors(predicted, actual)))


def r2(predicted: Tensor, actual: Tensor) -> float:
    """Share of the variance explained, 1 - MSE / Var(actual): 1 is perfect, 0 no better than the mean, below 0 worse.

    Raises ValueError if `actual` [N] is constant.
    """
    p, a = _vectors(predicted, actual)
    _check_varies("actual", actual)
    return float(r2_score(a, p))


def pearson(predicted: Tensor, actual: Tensor) -> float:
    """Linear correlation in [-1, 1]. Raises ValueError if either vector is constant."""
    vectors = _vectors(predicted, actual)
    _check_varies("predicted", predicted)
    _check_varies("actual", actual)
    return float(np.corrcoef(*vectors)[0, 1])


def auroc(score: Tensor, label: Tensor) -> float:
    """Probability that a random positive scores above a random negative, ties counted half; in [0, 1].

    `score` [N] in any unit, `label` [N] in {0, 1}. Raises ValueError if `label` holds one class only.
    """
    predicted, actual = _vectors(score, label)
    check_both_classes("label", label)
    return float(roc_auc_score(actual, predicted))


def calibration_curve(prob: Tensor, label: Tensor, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Predicted against actual in `bins` >= 1 bins of equally many rows, ordered by `prob` [N] in [0, 1]; no bin is empty."""
    _vectors(prob, label)
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


def quantiles(value: Tensor, at: Sequence[float]) -> list[float]:
    """Quantiles of `value` [N] at shares in [0, 1], interpolated; torch's own refuse more than 2^24 rows."""
    return np.quantile(value.double().numpy(), at).tolist()


def _vectors(predicted: Tensor, actual: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as NumPy vectors of double precision: as long as each other, finite, not empty; else ValueError."""
    check_same_length(predicted=predicted, actual=actual)
    check_finite("predicted", predicted)
    check_finite("actual", actual)
    if len(predicted) == 0:
        raise ValueError("predicted must hold at least one row, got none")
    return predicted.double().numpy(), actual.double().numpy()


def _check_varies(name: str, value: Tensor) -> None:
    if bool((value == value[0]).all()):
        raise ValueError(f"{name} must vary, got {value[0].item():.6g} in all {len(value)} rows")


def better_half(score: Tensor) -> Tensor:
    """Mask [M] of the better half by `score` [M]; where many have the median, the part above it, with or without these, that is
    nearer to half."""
    above, from_it = score > score.median(), score >= score.median()
    parts = [float(part.double().mean()) for part in (above, from_it)]
    return above if abs(parts[0] - 0.5) <= abs(parts[1] - 0.5) else from_it
