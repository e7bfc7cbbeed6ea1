"""Calibration: a monotone map from raw probabilities to honest ones, and its cross-fitted use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn

from causalrm_ray.checks import check_both_classes, check_same_length, check_unit_interval
from causalrm_ray.estimators.core.folds import fold_of


@dataclass(frozen=True)
class Calibration:
    """A non-decreasing piecewise linear map of [0, 1] through (x[k], y[k]), flat outside. `dataclasses.asdict` gives its JSON."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, prob: Tensor) -> Tensor:
        """Calibrated probabilities [N] of raw ones [N]."""
        check_unit_interval("prob", prob)
        return torch.from_numpy(np.interp(prob.numpy(), self.x, self.y)).to(prob.dtype)


def fit_calibration(prob: Tensor, label: Tensor, weight: Tensor | None = None) -> Calibration:
    """Isotonic regression of `label` [N] in {0, 1} on `prob` [N] in [0, 1] (Zadrozny and Elkan 2002); `weight` [N] > 0."""
    check_same_length(prob=prob, label=label)
    check_unit_interval("prob", prob)
    check_both_classes("label", label)
    weights = None if weight is None else weight.double().numpy()
    fitted = IsotonicRegression(y_min=0, y_max=1).fit(prob.double().numpy(), label.double().numpy(), weights)
    return Calibration(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))


def temperature(logit: Tensor, label: Tensor) -> float:
    """T in [e^-4, e^4] under which `label` [N] in {0, 1} fits `logit` [N] / T best. Guo et al. 2017, arXiv 1706.04599."""
    check_same_length(logit=logit, label=label)
    logits, labels = logit.double(), label.double()

    def risk(log_t: float) -> float:
        return float(nn.functional.binary_cross_entropy_with_logits(logits * math.exp(-log_t), labels))

    return math.exp(minimize_scalar(risk, bounds=(-4.0, 4.0), method="bounded").x)


def cross_calibrate(
    prob: Tensor,
    label: Tensor,
    seen: Tensor,
    folds: int,
    seed: int,
    weight: Tensor | None = None,
    cluster: Tensor | None = None,
) -> Tensor:
    """Calibrated probabilities [N], each by a map that did not see its row, nor another of its `cluster` [N], so that their
    calibration error is honest.

    Maps are fitted on the rows where `seen` [N] is true; `label` [N] is read only there. `prob` should be out-of-fold itself.
    """
    fold = fold_of(len(prob), folds, seed, cluster, seen)
    calibrated = torch.empty_like(prob)
    for number in range(folds):
        others = seen & (fold != number)
        calibration = fit_calibration(prob[others], label[others], None if weight is None else weight[others])
        calibrated[fold == number] = calibration(prob[fold == number])
    return calibrated
