"""Weights from device to device: learner rank 0 broadcasts packed buckets to every worker of every engine.

    layout: names, dtypes, shapes, version ---------- Ray ---------> engines
    rank 0: gather a parameter, pack it --> bucket ==broadcast==> worker: load views of it --> ... --> version and checksum

The group stands beside the default groups of DeepSpeed and vLLM: NCCL between GPUs, gloo on CPUs, one code path for both. Its
rank 0 is the learner's, and worker w of engine e is `rank_offsets(...)[e] + w`. Two buckets exist at a time on each side (an
engine keeps one longer while a layer of it waits for its other tensors). Imports neither ray, vllm nor deepspeed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """A process's place in the group: it is `rank` of `size` processes that meet at `address` ("tcp://host:port", which rank 0
    binds), waits `timeout_s` for each bucket, and as long but at most JOIN_S for all to come."""

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


def rank_offsets(workers: Sequence[int]) -> list[int]:
    """Rank of the first worker of each engine, `workers` being how many each has; rank 0 is the learner's."""
    return list(itertools.accumulate(workers[:-1], initial=1)) if workers else []


def make_layout(
    version: int, shapes: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], bucket_bytes: int = BUCKET_BYTES
) -> BucketLayout:
    """Tensors in their order, dealt to buckets of at most `bucket_bytes`; a larger one has a bucket of its own.

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


class Channel:
    """This process in the group."""

    def __init__(self, place: GroupRank, device: torch.device) -> None:
        """Meet the others; all must come. Raises LostPeerError where not all do in time."""
        self.place, self.device = place, device
        address, limit = urlparse(place.address), timedelta(seconds=min(place.timeout_s, JOIN_S))
        self._flights: deque[tuple[str, torch.distributed.Work]] = deque()
        with self._named("join"):
            self._store = TCPStore(
                str(address.hostname), int(address.port or 0), place.size, place.rank == 0, limit, wait_for_workers=False
            )
            self._store.set(f"came-{place.rank}", "")  # NCCL would wait for the others without end
            self._store.wait([f"came-{rank}" for rank in range(place.size)], limit)
            self._group: Any = _make_group(self._store, place, device)
        self.start(torch.zeros(1, device=device), "join")
        self.finish()  # NCCL connects at its first call

    def start(self, tensor: torch.Tensor, phase: str) -> None:
        """Begin to copy rank 0's `tensor` into everyone's; `phase` is how errors call it. Raises LostPeerError."""
        with self._named(phase):
            if self._group is None:
                raise LostPeerError("left after an earlier error")
            self._flights.append((phase, self._group.broadcast(tensor, 0)))

    def finish(self) -> None:
        """Wait for the oldest copy that was started. Raises LostPeerError."""
        with self._named(self._flights[0][0]):
            self._flights[0][1].wait(timedelta(seconds=self.place.timeout_s))
        self._flights.popleft()

    def close(self) -> None:
        """Leave, so that whoever waits for this process learns of it."""
        self._flights.clear()
        group, self._group = self._group, None
        if group is not None and self.device.type == "cuda":
            group.abort()  # NCCL's kernels would wait on; gloo's sockets close with the last reference

    @contextlib.contextmanager
    def leaving_on_error(self) -> Iterator[None]:
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
            place = self.place
            raise LostPeerError(
                f"weight sync by broadcast, {phase}, rank {place.rank} of {place.size} at {place.address}, "
                f"timeout_s={place.timeout_s:g}: {error}"
            ) from error


def joined(channel: Channel | None, place: GroupRank, device: torch.device) -> Channel:
    """`channel` if it is at that place already, else a new one that replaces it."""
    if channel is not None:
        if channel.place == place:
            return channel
        channel.close()
    return Channel(place, device)


def send(channel: Channel, layout: BucketLayout, named_tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
    """Broadcast the tensors that `layout` lists, one bucket on its way while the next is packed; then `version` and checksum.

    Raises ValueError for a tensor that is not the next of the layout, LostPeerError if a receiver is gone.
    """
    total = 0
    with channel.leaving_on_error():
        for number, bucket in enumerate(layout.buckets, start=1):
            packed = bucket.empty(channel.device)
            for name, room in bucket.views(packed):
                found, tensor = next(named_tensors)
                if (found, tensor.shape) != (name, room.shape):
                    raise ValueError(f"{name} {tuple(room.shape)} must come next, got {found} {tuple(tensor.shape)}")
                room.copy_(tensor)
            total += checksum([packed])
            if number > 1:
                channel.finish()
            channel.start(packed, _phase(layout, number))
        if layout.buckets:
            channel.finish()
        trailer = torch.tensor([version, np.uint64(total % (1 << 64)).view(np.int64)], device=channel.device)
        channel.start(trailer, _phase(layout, len(layout.buckets) + 1))
        channel.finish()


def receive(channel: Channel, layout: BucketLayout, load: Callable[[Iterator[tuple[str, torch.Tensor]]], object]) -> int:
    """Call `load` with the (name, tensor) of each bucket as it arrives, the next one on its way; returns the sender's checksum.

    A bucket's memory is never used again, so the tensors may be kept. Raises LostPeerError if the sender is gone, ValueError if
    it sent another version.
    """
    with channel.leaving_on_error():
        coming = _expect(channel, layout, 1)
        for number, bucket in enumerate(layout.buckets, start=1):
            packed, coming = coming, _expect(channel, layout, number + 1)
            channel.finish()
            load(bucket.views(packed))
        channel.finish()
        version, total = coming.tolist()
        if version != layout.version:
            raise ValueError(f"weights of version {layout.version} were announced, got version {version}")
        return total % (1 << 64)


def _expect(channel: Channel, layout: BucketLayout, number: int) -> torch.Tensor:
    """Where bucket `number` will be, or after the last one the version and the checksum."""
    if number > len(layout.buckets):
        room = torch.zeros(2, dtype=torch.int64, device=channel.device)
    else:
        room = layout.buckets[number - 1].empty(channel.device)
    channel.start(room, _phase(layout, number))
    return room


def _phase(layout: BucketLayout, number: int) -> str:
    if number > len(layout.buckets):
        return f"checksum of version {layout.version}"
    return f"bucket {number} of {len(layout.buckets)} of version {layout.version}"


def _make_group(store: TCPStore, place: GroupRank, device: torch.device) -> Any:
    limit = timedelta(seconds=place.timeout_s)
    if device.type == "cpu":
        return ProcessGroupGloo(store, place.rank, place.size, limit)
    from torch.distributed import ProcessGroupNCCL  # CUDA builds of torch have it

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * limit  # our own wait, which names the phase, must speak first
    with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):  # else its watchdog ends this process when another one dies
        return ProcessGroupNCCL(store, place.rank, place.size, options)


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
