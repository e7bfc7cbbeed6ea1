"""Two networks, each of which trains on the rows that the other finds easy: co-teaching, and CoDis.

batch -> loss of either network -> each picks its rows of lowest score -> the OTHER one's step      (more is dropped every epoch)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.task import FitTask, Fitted
from causalrm_ray.estimators.core.training import Objective, seeded
from causalrm_ray.estimators.methods.observed import cool, given_rates, minimise, observed, ramp_epochs
from causalrm_ray.losses.label_noise import forget_rate, jensen_shannon, noise_level, small_loss
from causalrm_ray.losses.pointwise import Loss

RAMP = 10  # epochs until all that is to be dropped is, as published


class Networks(nn.Module):
    """K scorers as one module: logits [B, K] of a batch as each of them reads it."""

    def __init__(self, *scorers: nn.Module) -> None:
        super().__init__()
        self.scorers = nn.ModuleList(scorers)

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits [B, K]."""
        return torch.stack([scorer(**batch) for scorer in self.scorers], dim=1)


def twins(task: FitTask) -> tuple[nn.Module, nn.Module]:
    """Two scorers of different start.

    Scorers that start alike (a pretrained backbone under a zero head) would choose alike for ever: the second's head is redrawn.
    """
    first, second = task.scorer(), task.scorer(1)
    other = second.state_dict()
    if all(torch.equal(value, other[name]) for name, value in first.state_dict().items()) and isinstance(second.head, nn.Linear):
        redrawn = seeded(lambda: nn.Linear(second.head.in_features, 1), task.settings.seed + 1)
        second.head.load_state_dict(redrawn.state_dict(), strict=False)
    return first, second


class Exchange:
    """Risk of two networks that teach each other, by the epoch's share of dropped rows.

    `r` [N]; `level` in [0, 1), the share of wrong labels, dropped in full from epoch `ramp` on; rows are chosen by
    loss - `discrepancy` * divergence of the two predictions.
    """

    def __init__(self, loss: Loss, r: Tensor, level: float, ramp: int, discrepancy: float) -> None:
        self._loss, self._r, self._discrepancy = loss, r, discrepancy
        self._level, self._ramp = level, ramp
        self._dropped = 0.0

    def begin(self, epoch: int) -> None:
        """Drop what the schedule says for `epoch` >= 1."""
        self._dropped = forget_rate(epoch, self._level, self._ramp)

    def risk(self, logit: Tensor, index: Tensor) -> Tensor:
        """Risk [B] of `logit` [B, 2]: its mean is the sum over the networks of their mean losses on the rows chosen for them."""
        first, second = (self._loss(logit[:, k], self._r[index]) for k in range(2))
        apart = self._discrepancy * jensen_shannon(logit[:, 0], logit[:, 1]).detach() if self._discrepancy else 0.0
        for_first = small_loss(second.detach() - apart, self._dropped)
        for_second = small_loss(first.detach() - apart, self._dropped)
        return (for_first * first + for_second * second) * (len(index) / for_first.sum())


def fit_small_loss(task: FitTask, discrepancy: float = 0.0) -> Fitted:
    """Co-teaching; with `discrepancy` > 0 CoDis, which prefers rows that the networks see differently.

    The share of wrong labels comes from the rates and the share of likes. It is reached in epoch RAMP (sooner in a short
    fit), from which on epochs compete to be the best one. CoDis chooses rows by the divergence but trains on the loss
    alone; its weight 0.1 is that of the released code. Over several processes each chooses within its slice of a batch. The first
    network serves, at the temperature that suits held-out feedback (ours): who learns from easy rows only is too sure of all.
    """
    rates, rows, r = given_rates(task), observed(task, task.train), task.observations.r
    ramp = ramp_epochs(task.settings, RAMP)
    level = noise_level(float(r[rows].mean()) if len(rows) else 0.0, rates)
    first, second = twins(task)
    exchange = Exchange(task.loss, r, level, ramp, discrepancy)
    report = minimise(task, Networks(first, second), Objective(rows, exchange.risk, exchange.begin, since=ramp))
    return Fitted(first, report, {"forget_rate": level, "temperature": cool(task, first)})
