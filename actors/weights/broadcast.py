"""Weights from device to device: learner rank 0 broadcasts packed buckets to every worker of every engine.

    layout: names, dtypes, shapes, version ---------- Ray ---------> engines
    rank 0: gather a parameter, pack it --> bucket ==broadcast==> worker: load views of it --> ... --> version and checksum

The group stands beside the default groups of DeepSpeed and vLLM: NCCL between GPUs, gloo on CPUs, one code path for both. Its
rank 0 is the learner's, and the workers of all engines follow in order. Two buckets exist at a time on each side (an
engine keeps one longer while a layer of it waits for its other tensors). Imports neither ray, vllm nor deepspeed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from actors.errors import LostPeerError
from actors.weights.buckets import BUCKET_BYTES
from actors.weights.packing import DTYPES, Entry, checksum, dtype_name

JOIN_S = 120.0  # longest wait for the others to come: all were alive when they were called


@dataclass(frozen=True, slots=True)
class GroupRank:
    """A member of the group: it is `rank` of `size` processes that meet at `address` ("tcp://host:port", which rank 0 binds), and
    waits `timeout_s` for each bucket and to meet, there at most JOIN_S."""

    address: str
    rank: int
    size: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of one dtype that travel together as `size` elements; the offsets of its `entries` count from its start."""

    dtype: str
    size: int
    entries: tuple[Entry, ...]

    def empty(self, device: torch.device) -> torch.Tensor:
        """Room for it, [size]."""
        return torch.empty(self.size, dtype=DTYPES[self.dtype], device=device)

    def views(self, packed: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor) in `packed` [size], none of them a copy."""
        for entry in self.entries:
            yield entry.name, packed[entry.offset : entry.offset + math.prod(entry.shape)].view(entry.shape)


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """What is about to be sent: one policy version, bucket by bucket."""

    version: int
    buckets: tuple[Bucket, ...]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(bucket.size * DTYPES[bucket.dtype].itemsize for bucket in self.buckets)


def make_layout(
    version: int, shapes: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], bucket_bytes: int = BUCKET_BYTES
) -> BucketLayout:
    """Tensors in their order, split over buckets of at most `bucket_bytes`; a larger one has a bucket of its own.

    Raises ValueError for a dtype other than float32, bfloat16 and float16.
    """
    parts: list[list[Entry]] = []
    end = 0  # of the last bucket, elements
    for name, dtype, shape in shapes:
        kind, size = dtype_name(name, dtype), math.prod(shape)
        if not parts or parts[-1][-1].dtype != kind or (end + size) * dtype.itemsize > bucket_bytes:
            parts.append([])
            end = 0
        parts[-1].append(Entry(name, kind, tuple(shape), end))
        end += size
    sizes = (part[-1].offset + math.prod(part[-1].shape) for part in parts)
    return BucketLayout(version, tuple(Bucket(part[0].dtype, size, tuple(part)) for part, size in zip(parts, sizes, strict=True)))


class BroadcastGroup:
    """This process in the group."""

    def __init__(self, member: GroupRank, device: torch.device) -> None:
        """Meet the others; all must come. Raises LostPeerError where not all do in time."""
        self.member, self.device = member, device
        address, limit = urlparse(member.address), timedelta(seconds=min(member.timeout_s, JOIN_S))
        self._in_flight: deque[tuple[str, torch.distributed.Work]] = deque()
        with self._named("join"):
            self._store = TCPStore(
                str(address.hostname), int(address.port or 0), member.size, member.rank == 0, limit, wait_for_workers=False
            )
            self._store.set(f"came-{member.rank}", "")  # NCCL would wait for the others without end
            self._store.wait([f"came-{rank}" for rank in range(member.size)], limit)
            self._backend: Any = _make_backend(self._store, member, device)
        self.start(torch.zeros(1, device=device), "join")
        self.finish()  # NCCL connects at its first call

    def start(self, tensor: torch.Tensor, phase: str) -> None:
        """Begin to copy rank 0's `tensor` into everyone's; `phase` is how errors call it. Raises LostPeerError."""
        with self._named(phase):
            if self._backend is None:
                raise LostPeerError("left after an earlier error")
            self._in_flight.append((phase, self._backend.broadcast(tensor, 0)))

    def finish(self) -> None:
        """Wait for the oldest copy that was started. Raises LostPeerError."""
        with self._named(self._in_flight[0][0]):
            self._in_flight[0][1].wait(timedelta(seconds=self.member.timeout_s))
        self._in_flight.popleft()

    def close(self) -> None:
        """Leave, so that those who wait for this process get an error."""
        self._in_flight.clear()
        group, self._backend = self._backend, None
        if group is not None and self.device.type == "cuda":
            group.abort()  # NCCL's kernels would wait on; gloo's sockets close with the last reference

    @contextlib.contextmanager
    def close_on_error(self) -> Iterator[None]:
        """Close unless the block ends well: the others would wait until they give up."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            yield
            stack.pop_all()

    @contextlib.contextmanager
    def _named(self, phase: str) -> Iterator[None]:
        try:
            yield
        except LostPeerError:
            raise
        except RuntimeError as error:  # of torch.distributed, for all that can happen
            member = self.member
            raise LostPeerError(
                f"weight sync by broadcast, {phase}, rank {member.rank} of {member.size} at {member.address}, "
                f"timeout_s={member.timeout_s:g}: {error}"
            ) from error


def join_group(group: BroadcastGroup | None, member: GroupRank, device: torch.device) -> BroadcastGroup:
    """`group` if it is that member's already, else a new one that replaces it."""
    if group is not None:
        if group.member == member:
            return group
        group.close()
    return BroadcastGroup(member, device)


def send(group: BroadcastGroup, layout: BucketLayout, named_tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
    """Broadcast the tensors that `layout` describes, one bucket on its way while the next is packed; then `version` and checksum.

    Raises ValueError for a tensor that is not the next of the layout, LostPeerError if a receiver is gone.
    """
    total = 0
    with group.close_on_error():
        for number, bucket in enumerate(layout.buckets, start=1):
            packed = bucket.empty(group.device)
            for name, room in bucket.views(packed):
                found, tensor = next(named_tensors)
                if (found, tensor.shape) != (name, room.shape):
                    raise ValueError(f"{name} {tuple(room.shape)} must come next, got {found} {tuple(tensor.shape)}")
                room.copy_(tensor)
            total += checksum([packed])
            if number > 1:
                group.finish()
            group.start(packed, _phase(layout, number))
        if layout.buckets:
            group.finish()
        trailer = torch.tensor([version, np.uint64(total % (1 << 64)).view(np.int64)], device=group.device)
        group.start(trailer, _phase(layout, len(layout.buckets) + 1))
        group.finish()


def receive(group: BroadcastGroup, layout: BucketLayout, load: Callable[[Iterator[tuple[str, torch.Tensor]]], object]) -> int:
    """Call `load` with the (name, tensor) of each bucket as it arrives, the next one on its way; returns the sender's checksum.

    A bucket's memory is never used again, so the tensors may be kept. Raises LostPeerError if the sender is gone, ValueError if
    it sent another version.
    """
    with group.close_on_error():
        coming = _expect(group, layout, 1)
        for number, bucket in enumerate(layout.buckets, start=1):
            packed, coming = coming, _expect(group, layout, number + 1)
            group.finish()
            load(bucket.views(packed))
        group.finish()
        version, total = coming.tolist()
        if version != layout.version:
            raise ValueError(f"weights of version {layout.version} must come, got version {version}")
        return total % (1 << 64)


def _expect(group: BroadcastGroup, layout: BucketLayout, number: int) -> torch.Tensor:
    """Where bucket `number` will be, or after the last one the version and the checksum."""
    if number > len(layout.buckets):
        room = torch.zeros(2, dtype=torch.int64, device=group.device)
    else:
        room = layout.buckets[number - 1].empty(group.device)
    group.start(room, _phase(layout, number))
    return room


def _phase(layout: BucketLayout, number: int) -> str:
    if number > len(layout.buckets):
        return f"checksum of version {layout.version}"
    return f"bucket {number} of {len(layout.buckets)} of version {layout.version}"


def _make_backend(store: TCPStore, member: GroupRank, device: torch.device) -> Any:
    limit = timedelta(seconds=member.timeout_s)
    if device.type == "cpu":
        return ProcessGroupGloo(store, member.rank, member.size, limit)
    from torch.distributed import ProcessGroupNCCL  # CUDA builds of torch have it

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * limit  # our own wait, which names the phase, must end first
    with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):  # else its watchdog ends this process when another one dies
        return ProcessGroupNCCL(store, member.rank, member.size, options)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable while the block lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
