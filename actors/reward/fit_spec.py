"""What a reward fit is told, and where its workers get it: light to import, for the process of the orders reads it too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from causalrm_ray.config.train import RewardConfig

REPORT = "report.json"
LOSS = "bce"  # cross-entropy on the logit
BATCH_SIZE = 64  # rows per optimizer step over all workers, of reward and propensity models
PROPENSITY_EPOCHS = 2  # most passes: all impressions teach it, the reward model only those with feedback


@dataclass(frozen=True, eq=False)
class FitSpec:
    """All that a worker needs to know.

    Paths must be readable from every worker. `start` is the model that fits begin from, under a blank head;
    `serving` (with `serving_version`) is measured on the same held-out rows. `propensity` [N], `clean_labels` [N].
    """

    snapshot: Path
    backbone: str
    start: str
    serving: str | None
    serving_version: int
    propensity: np.ndarray
    clean_labels: np.ndarray | None
    methods: Sequence[str]
    config: RewardConfig
    max_length: int
    seed: int


class FitQueue:
    """The counter between a reward role and its Ray Train workers: one order at a time, there to take until it is done."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._number = 0
        self._order: tuple[int, FitSpec, Path] | None = None
        self._seconds: asyncio.Future[float] | None = None
        self._closed = False

    async def fitted(self, order: FitSpec, folder: Path) -> float:
        """Lay out `order`, in the place of one that may still lie there, and wait until workers have it in `folder`. Returns the
        seconds that they took."""
        async with self._changed:
            self._number += 1
            self._order = self._number, order, folder
            seconds = self._seconds = asyncio.get_running_loop().create_future()
            self._changed.notify_all()
        return await seconds

    async def take(self) -> tuple[int, FitSpec, Path] | None:
        """The order that lies there, waiting for one: (number, order, folder to write). None: there will be no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._order is not None or self._closed)
            return None if self._closed else self._order

    async def done(self, number: int, seconds: float) -> None:
        """Order `number` is in its folder; one that does not lie there any more is nobody's concern."""
        if self._order is not None and self._seconds is not None and number == self._order[0]:
            self._order = None
            self._seconds.set_result(seconds)

    async def close(self) -> None:
        """No more orders: let the workers end."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
