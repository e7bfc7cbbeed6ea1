"""The specification of a reward fit, and the queue from which its workers take it; light to import: the queue is a process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from causalrm_ray.config.train import RewardConfig
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.types import PerUser

LOSS = "bce"  # cross-entropy on the logit
BATCH_SIZE = 64  # rows per optimizer step over all workers, where a whole model is tuned


@dataclass(frozen=True, slots=True)
class FitSpec:
    """All that a worker needs for a fit; data go by path, and every path must be readable from every worker.

    `snapshot` of the log; `cache`: folder of the states and token ids of its rows; `propensities`: folder of the propensity
    model's version, which holds those of the snapshot's rows; `clean_labels`: file with r* of the rows, for the method "oracle"
    only; `judged`: one with r* of the few that were judged, nan elsewhere (`feedback.clean`). `backbone` says which states are
    read. `per_user` is that of `load_rows`; `serving` (with
    `serving_version`) is measured on the same held-out rows.
    Raises ValueError if `methods` lack the one that `config` lets serve, or a path does not exist.
    """

    snapshot: Path
    cache: Path
    propensities: Path
    clean_labels: Path | None
    judged: Path | None
    backbone: Backbone
    serving: str | None
    serving_version: int
    methods: tuple[str, ...]
    config: RewardConfig
    max_length: int
    per_user: PerUser
    seed: int

    def __post_init__(self) -> None:
        if self.config.method not in self.methods:
            raise ValueError(f"methods must include the one that serves, {self.config.method!r}, got {list(self.methods)}")
        for name in ("snapshot", "cache", "propensities", "clean_labels", "judged"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise ValueError(f"{name} must be a path that exists, got {path}")


class FitQueue:
    """Stands between a reward role and its Ray Train workers: one fit at a time, which stays here until it is done."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._number = 0
        self._fit: tuple[int, FitSpec, Path] | None = None
        self._seconds: asyncio.Future[float] | None = None
        self._closed = False

    async def fitted(self, spec: FitSpec, folder: Path) -> float:
        """Offer `spec` to the workers, in place of one that they have not finished, and wait until they have written `folder`.
        Returns the seconds that they took."""
        async with self._changed:
            self._number += 1
            self._fit = self._number, spec, folder
            seconds = self._seconds = asyncio.get_running_loop().create_future()
            self._changed.notify_all()
        return await seconds

    async def take(self) -> tuple[int, FitSpec, Path] | None:
        """(number, specification, folder to write) of the current fit, waiting for one. None: there will be no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._fit is not None or self._closed)
            return None if self._closed else self._fit

    async def done(self, number: int, seconds: float) -> None:
        """Fit `number` is in its folder; one that was replaced meanwhile is ignored."""
        if self._fit is not None and self._seconds is not None and number == self._fit[0]:
            self._fit = None
            self._seconds.set_result(seconds)

    async def close(self) -> None:
        """No more fits: let the workers end."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
