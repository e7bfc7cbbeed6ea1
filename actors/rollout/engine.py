"""What the system asks of an inference engine, and what an engine's class says of itself before it starts.

The plan, the configuration and `doctor` read a class's attributes: its module must not import torch or the engine at its top.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from causalrm_ray.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from actors.weights.broadcast import BucketLayout, GroupRank
    from actors.weights.ipc import SharedWeights
    from actors.weights.packing import SyncReport, Weights

MAX_SEQUENCES = 128  # that an engine writes at once on a CPU, and memory is planned for
DEVICE_SHARE = 0.9  # of a GPU's memory that may be planned with


Transport = Literal["object", "broadcast", "ipc"]  # how weights reach an engine, see actors/weights/publish


class Library(NamedTuple):
    """A module that must be importable: the distributions that may bring it, and how to install it."""

    distributions: tuple[str, ...]
    remedy: str


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
        """Abort what is not finished yet; does nothing on an exhausted stream."""
        ...


class Engine(ABC):
    """An inference engine that many threads may call at once. It is built from EngineSettings alone.

    tensor_parallel  whether one copy of the model may be spread over several GPUs
    shares_process   whether it may run in a process with other roles (cluster.address=in-process)
    transports       how it takes weights; every engine takes them as an object
    process_bytes    memory that its process takes on a CPU with a tiny model
    requires         modules besides torch and transformers that it imports
    unsupported      types of models (config.json's model_type, of a language model) that it cannot take new weights of, and why
    """

    tensor_parallel: ClassVar[bool] = False
    shares_process: ClassVar[bool] = False
    transports: ClassVar[frozenset[Transport]] = frozenset({"object"})
    process_bytes: ClassVar[int] = 1 << 29
    requires: ClassVar[Mapping[str, Library]] = MappingProxyType({})
    unsupported: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @staticmethod
    def process_env(model: str, cache: str | Path, gpu: bool) -> dict[str, str]:
        """Environment variables that its process must start with. `cache` is a folder for what it computes once."""
        return {}

    @abstractmethod
    def __init__(self, settings: EngineSettings) -> None: ...

    @abstractmethod
    def submit(self, requests: Sequence[Request], sampling: Sampling) -> CompletionStream:
        """Start a batch as a whole (no step of the engine sees a part of it) and stream its answers as they finish."""

    @abstractmethod
    def load_weights(self, weights: Weights) -> SyncReport:
        """Replace the parameters between two steps and discard every cached prefix. Returns once they are verified.

        Requests in flight go on with the new weights. Raises TimeoutError that names the phase which took too long.
        """

    def receive_weights(self, layout: BucketLayout, member: GroupRank) -> SyncReport:
        """As `load_weights`, but from a broadcast that has not begun: its first worker is `member` of the group.

        Raises LostPeerError if the sender is lost. An engine that fails during it is dead, and leaves the group.
        """
        raise NotImplementedError(f"{type(self).__name__} does not receive broadcasts")

    def map_weights(self, shared: SharedWeights) -> SyncReport:
        """As `load_weights`, from memory that a process on the same device shares. An engine that fails during it is dead."""
        raise NotImplementedError(f"{type(self).__name__} does not map shared weights")

    @abstractmethod
    def versions(self) -> Mapping[str, str | int]:
        """`name` and `version` of the engine, `policy_version` of its weights, and its `device`. Raises EngineDeadError."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine. Callers that still wait get EngineDeadError."""
