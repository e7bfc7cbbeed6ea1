"""The mode of a density of a few parameters, by Fisher's scoring."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS, TOLERANCE = 100, 1e-7  # most steps, and the one that is small enough


def maximise(density: Callable[[Tensor], float], curvature: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """The parameters [P] of greatest log `density`, found from `start` [P].

    `curvature` gives its gradient [P] and its expected information [P, P]. A step that does not raise the density is halved.
    """
    at, best = start, density(start)
    for _ in range(STEPS):
        gradient, information = curvature(at)
        step = torch.linalg.solve(information, gradient)
        while float(step.abs().max()) > TOLERANCE and not density(at + step) > best:
            step = step / 2
        if float(step.abs().max()) <= TOLERANCE:
            break
        at, best = at + step, density(at + step)
    return at
