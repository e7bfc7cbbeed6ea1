"""Columns that a user hands over, NumPy, pandas or torch, as NumPy vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from causalrm_ray.errors import InputError


def as_vector(name: str, value: Any) -> np.ndarray:
    """A NumPy, pandas or torch vector [N] as NumPy."""
    if value is None:
        raise ValueError(f"RewardEstimator requires {name} to be passed, but the target {name} is None")
    return column_or_1d(np.asarray(value.numpy(force=True) if isinstance(value, Tensor) else value), warn=True)


def plain(labels: np.ndarray) -> np.ndarray:
    """Labels of an object array in the type that they are of."""
    return np.array(labels.tolist()) if labels.dtype == object else labels


def encode_labels(labels: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two classes among the labels [N] that are `given` (a mask), and r [N] in {0, 1}, nan where none is."""
    known = plain(labels[given])
    check_classification_targets(known)
    classes, place = np.unique(known, return_inverse=True)
    if len(classes) > 2:
        kind = type_of_target(known)
        raise ValueError(
            f"Only binary classification is supported. The type of the target is {kind}: y holds {len(classes)} classes"
        )
    if len(classes) < 2:
        raise InputError(
            f"y must hold two classes among the {len(known)} labels given, got {len(classes)} class: {classes.tolist()}"
        )
    r = np.full(len(labels), np.nan, dtype=np.float32)
    r[given] = place
    return classes, r


def check_rows_match(**rows: int) -> None:
    """Raise ValueError unless all arguments have as many rows."""
    if len(set(rows.values())) > 1:
        raise ValueError(f"rows must match, got inconsistent numbers of samples: {rows}")
