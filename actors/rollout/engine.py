"""What the system asks of an inference engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from causalrm_ray.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from actors.weights.broadcast import BucketLayout, GroupRank
    from actors.weights.ipc import SharedWeights
    from actors.weights.packing import SyncReport, Weights

MAX_SEQUENCES = 128  # that an engine writes at once on a CPU, and memory is planned for
DEVICE_SHARE = 0.9  # of a GPU's memory that may be planned with


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with.

    `model` is a local Hugging Face folder or a hub id, and `version` that of its weights; `max_length` the longest prompt plus
    answer, tokens; `dtype` "float32" or "bfloat16"; `cache` the folder for what an engine works out once; `timeout_s` the
    longest wait for any one phase; `buffer` the number of unread answers that holds generation back; `tensor_parallel` the
    number of GPUs that one copy of the model is spread over; `gpu_memory` the share of a GPU's memory that it may fill.
    """

    model: str
    max_length: int
    dtype: str
    cache: str | Path
    timeout_s: float
    buffer: int
    version: int = 0
    tensor_parallel: int = 1
    gpu_memory: float = DEVICE_SHARE


class CompletionStream(Iterator[Completion], Protocol):
    """The answers to one batch, each as it finishes."""

    def close(self) -> None:
        """Give up what is not finished yet. Harmless on an exhausted stream."""
        ...


class Engine(Protocol):
    """An inference engine that many threads may call at once."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> CompletionStream:
        """Start a batch as a whole (no step of the engine sees a part of it) and stream its answers as they finish."""
        ...

    def load_weights(self, weights: Weights) -> SyncReport:
        """Replace the parameters between two steps and forget every cached prefix. Returns once they are verified.

        Requests in flight go on with the new weights. Raises TimeoutError that names the phase which took too long.
        """
        ...

    def receive_weights(self, layout: BucketLayout, place: GroupRank) -> SyncReport:
        """As `load_weights`, but from a broadcast that has not begun: its first worker is at `place` in the group.

        Raises LostPeerError if the sender is lost. An engine that fails on the way is dead, and leaves the group.
        """
        ...

    def map_weights(self, shared: SharedWeights) -> SyncReport:
        """As `load_weights`, from memory that a process on the same device shows. An engine that fails on the way is dead."""
        ...

    def versions(self) -> Mapping[str, str | int]:
        """`name` and `version` of the engine, `policy_version` of its weights, and its `device`. Raises EngineDeadError."""
        ...

    def close(self) -> None:
        """Free the engine. Callers that still wait get EngineDeadError."""
        ...
