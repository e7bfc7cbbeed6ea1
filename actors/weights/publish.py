"""The learner's weights to all generators, by one of three transports (the plan chooses).

object      learner rank 0 packs them in host memory --> Ray's object store --> each generator      (see packing)
broadcast   learner rank 0 ==buckets, over NCCL or gloo==> each worker of each generator             (see broadcast)
ipc         each generator maps the memory of the learner rank on its own GPU                        (see ipc)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.cluster.place import rendezvous
from actors.cluster.wait import resolve_all
from actors.weights.broadcast import GroupRank
from actors.weights.buckets import BUCKET_BYTES
from actors.weights.packing import SyncReport


class Publisher(Protocol):
    """A transport."""

    def publish(self, generators: Mapping[str, Any]) -> dict[str, SyncReport]:
        """Give the learner's newest weights to these generators, and return each one's report, by name.

        Raises RoleDiedError, RoleTimeoutError or RuntimeError that names who failed; those have no usable weights any more.
        """
        ...


@dataclass(frozen=True)
class ByObject:
    """Whole weights, or with `adapter` the adapter's factors alone, as one object."""

    learners: Sequence[Any]
    adapter: bool
    timeout_s: float

    def publish(self, generators: Mapping[str, Any]) -> dict[str, SyncReport]:
        """See Publisher."""
        verb = "adapter" if self.adapter else "weights"
        weights, *_ = [getattr(rank, verb).remote() for rank in self.learners]  # every rank must be called: ZeRO-3 gathers
        taking = {name: generator.take_weights.remote(weights) for name, generator in generators.items()}
        return resolve_all(taking, "sync weights", self.timeout_s)


@dataclass
class ByBroadcast:
    """Whole weights over a process group of rank 0 of the learner and all workers of all generators.

    They join it at the first time, and again in a new one where others take part than before, or after an error. `workers` is
    the number of processes of one generator; `bundle` says where rank 0 sits (see `rendezvous`).
    """

    learners: Sequence[Any]
    workers: int
    bundle: Any
    timeout_s: float
    bucket_bytes: int = BUCKET_BYTES
    _address: str = field(default="", init=False)
    _members: list[Any] = field(default_factory=list, init=False)

    def publish(self, generators: Mapping[str, Any]) -> dict[str, SyncReport]:
        """See Publisher."""
        members, self._members = self._members, []
        if members != list(generators.values()):
            alive = {name: generator.info.remote() for name, generator in generators.items()}
            resolve_all(alive, "gather for a broadcast", self.timeout_s)  # all would wait for one that cannot come
            self._address = rendezvous(self.bundle, self.timeout_s)
        size = 1 + self.workers * len(generators)
        ranks = [0, *range(1, size, self.workers)]  # of the learner, and of the first worker of each engine
        first, *others = [GroupRank(self._address, rank, size, self.timeout_s) for rank in ranks]
        layout = self.learners[0].bucket_layout.remote(self.bucket_bytes)
        sending = {f"learner-{rank}": role.send_weights.remote(layout, first) for rank, role in enumerate(self.learners)}
        taking = {
            name: generator.receive_weights.remote(layout, member)
            for (name, generator), member in zip(generators.items(), others, strict=True)
        }
        # a member that waits for a bucket in vain raises, and names the phase, after timeout_s: it must have the time to
        done = resolve_all({**sending, **taking}, "sync weights by broadcast", 2 * self.timeout_s)
        self._members = list(generators.values())
        return {name: done[name] for name in taking}


@dataclass(frozen=True)
class ByIpc:
    """Whole weights, not split by ZeRO-3, of the rank that `partners` names for each generator: both are on one GPU."""

    learners: Sequence[Any]
    partners: Mapping[str, int]
    timeout_s: float

    def publish(self, generators: Mapping[str, Any]) -> dict[str, SyncReport]:
        """See Publisher."""
        ranks = sorted({self.partners[name] for name in generators})
        shown = {rank: self.learners[rank].share_weights.remote() for rank in ranks}
        taking = {name: generator.map_weights.remote(shown[self.partners[name]]) for name, generator in generators.items()}
        return resolve_all(taking, "sync weights by ipc", self.timeout_s)
