"""Losses of one row: how far a logit is from a label."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from causalrm_ray.checks import check_same_length, check_unit_interval

MAX_LOGIT = 4.0  # the probability is resolved within 0.018..0.982
Loss = Callable[[Tensor, Tensor], Tensor]  # (logit [N], label [N] in [0, 1]) -> loss [N]


def bce(logit: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of each row, in nats.

        l(s, y) = -y log sigmoid(s) - (1 - y) log(1 - sigmoid(s))

    `logit` [N]; `y` [N] in [0, 1], soft labels allowed. Returns [N], >= 0. Raises ValueError for other rows or labels.
    """
    check_same_length(logit=logit, y=y)
    check_unit_interval("y", y)
    return _cross_entropy(logit, y)


def mse(logit: Tensor, y: Tensor) -> Tensor:
    """Squared error of each row's probability.

        l(s, y) = (sigmoid(s) - y)^2

    `logit` [N]; `y` [N] in [0, 1], soft labels allowed. Returns [N] in [0, 1]. Raises ValueError for other rows or labels.
    """
    check_same_length(logit=logit, y=y)
    check_unit_interval("y", y)
    return (torch.sigmoid(logit) - y).square()


def bounded_bce(logit: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a logit that saturates, in nats, for risks in which losses are subtracted.

        l(s, y) = bce(B tanh(s / B), y),   B = MAX_LOGIT

    A loss of its own right: corrected for noise or selection it is as unbiased for its own clean risk as `bce` is, but no risk
    made of it can fall without end, which `bce`'s does wherever the assumed noise is stronger than the true one.
    `logit` [N]; `y` [N] in [0, 1]. Returns [N] in [0, MAX_LOGIT + 0.02].
    """
    return bce(_bound(logit), y)


def _cross_entropy(logit: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit, y.to(logit.dtype), reduction="none")


def _bound(logit: Tensor) -> Tensor:
    return MAX_LOGIT * torch.tanh(logit / MAX_LOGIT)


# losses linear in the label -> the same for any real label, as corrections for noise and selection make of them
LINEAR: dict[Loss, Loss] = {bce: _cross_entropy, bounded_bce: lambda logit, y: _cross_entropy(_bound(logit), y)}
LOSSES: dict[str, Loss] = {"bce": bce, "mse": mse}
