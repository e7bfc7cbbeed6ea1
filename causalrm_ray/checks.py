"""Contracts on tensors: each names the argument, the rule and the value that broke it."""

from __future__ import annotations

from typing import Literal

import torch

from causalrm_ray.errors import InputError


def check_finite(name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless every entry of `value` is finite."""
    _check_all(name, value, torch.isfinite(value), "finite")


def check_same_length(**arrays: torch.Tensor) -> None:
    """Raise ValueError unless all arguments have the same first dimension."""
    lengths = {name: value.shape[0] for name, value in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"rows must match, got {lengths}")


def check_propensity(name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless every entry lies in (0, 1]."""
    check_unit_interval(name, value, "(0, 1]")


def check_unit_interval(name: str, value: torch.Tensor, interval: Literal["[0, 1]", "(0, 1]"] = "[0, 1]") -> None:
    """Raise ValueError unless every entry lies in the interval."""
    check_finite(name, value)
    if bool((value < 0).any()) or bool((value > 1).any()) or (interval == "(0, 1]" and bool((value == 0).any())):
        raise ValueError(f"{name} must be in {interval}, got min={value.min().item():.6g} max={value.max().item():.6g}")


def check_binary(name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless every entry is 0 or 1."""
    check_finite(name, value)
    _check_all(name, value, (value == 0) | (value == 1), "0 or 1")


def check_both_classes(name: str, value: torch.Tensor) -> None:
    """Raise InputError, a ValueError, unless `value` [N] in {0, 1} holds at least one of each class."""
    check_binary(name, value)
    positive = int(torch.count_nonzero(value))  # a sum in float32 is not exact beyond 2^24 rows
    if positive in (0, value.numel()):
        raise InputError(f"{name} must hold both classes, got {positive} ones in {value.numel()} rows")


def _check_all(name: str, value: torch.Tensor, holds: torch.Tensor, rule: str) -> None:
    if not bool(holds.all()):
        row = int((~holds).reshape(-1).nonzero()[0])
        raise ValueError(f"{name} must be {rule}, got {value.reshape(-1)[row].item()} at position {row}")
