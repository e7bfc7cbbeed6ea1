"""The learner's weights to all generators, by one of two transports (which one is the plan's to say).

object      learner rank 0 packs them in host memory --> Ray's object store --> each generator      (see actors/weight_sync)
broadcast   learner rank 0 ==buckets, over NCCL or gloo==> each worker of each generator             (see actors/device_sync)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.device_sync import BUCKET_BYTES, Membership, rank_offsets
from actors.placement import rendezvous, resolve, resolve_all
from actors.weight_sync import SyncReport


@dataclass
class ByObject:
    """Whole weights, or with `adapter` the adapter's factors alone, as one object."""

    learners: Sequence[Any]
    generators: Mapping[str, Any]
    adapter: bool
    timeout_s: float

    def publish(self) -> dict[str, SyncReport]:
        """Each generator's report, by its name."""
        verb = "adapter" if self.adapter else "weights"
        weights, *_ = [getattr(rank, verb).remote() for rank in self.learners]  # every rank must be called: ZeRO-3 gathers
        taking = [generator.take_weights.remote(weights) for generator in self.generators.values()]
        return dict(zip(self.generators, resolve(taking, "sync weights", self.timeout_s), strict=True))


@dataclass
class ByBroadcast:
    """Whole weights over a process group that rank 0 of the learner and all workers of all generators join at the first time.

    `workers` is the number of processes of one generator; `bundle` says where rank 0 sits (see `rendezvous`).
    """

    learners: Sequence[Any]
    generators: Mapping[str, Any]
    workers: int
    bundle: Any
    timeout_s: float
    bucket_bytes: int = BUCKET_BYTES
    _address: str = field(default="", init=False)

    def publish(self) -> dict[str, SyncReport]:
        """Each generator's report, by its name. Raises RoleDiedError, RoleTimeoutError or RuntimeError that names who failed."""
        self._address = self._address or rendezvous(self.bundle)
        size = 1 + self.workers * len(self.generators)
        first, *places = [
            Membership(self._address, rank, size, self.timeout_s)
            for rank in [0, *rank_offsets([self.workers] * len(self.generators))]
        ]
        outline = self.learners[0].outline.remote(self.bucket_bytes)
        sending = {f"learner-{rank}": role.send_weights.remote(outline, first) for rank, role in enumerate(self.learners)}
        taking = {
            name: generator.receive_weights.remote(outline, place)
            for (name, generator), place in zip(self.generators.items(), places, strict=True)
        }
        # each member waits timeout_s for the others and then says in which phase: they must have the time to
        done = resolve_all({**sending, **taking}, "sync weights by broadcast", 2 * self.timeout_s)
        return {name: done[name] for name in taking}
