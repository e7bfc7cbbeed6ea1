"""The learning rate over a run, as a share of the configured one."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(position: int, warmup: int, total: int, schedule: Schedule) -> float:
    """Share, in [0, 1], of the learning rate at optimizer step `position` >= 0 of `total`, the first `warmup` of which warm up.

        (position + 1) / warmup                                    position < warmup
        1, 1 - progress or (1 + cos(pi progress)) / 2              progress = (position - warmup) / (total - warmup) from there on

    for "constant", "linear" and "cosine" (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5, without restarts). The first step
    after warm-up has the whole rate, and none has 0; past `total` the rate is that of the last step.
    """
    if position < warmup:
        return (position + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (min(position, total - 1) - warmup) / max(total - warmup, 1)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
