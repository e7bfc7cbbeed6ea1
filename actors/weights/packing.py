"""Weights on their way from the learner to the engines: one bucket of bytes per dtype, an index and a checksum.

learner rank 0: pack --> Weights --> Ray object store --> verify, unpack (views, no copy) --> engine
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_CHUNK = {"cpu": 1 << 15}  # elements whose products are in memory at once: of a CPU in its cache, four times as fast


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `offset` counts elements from the start of the bucket of its `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters of one policy version.

    `buckets` maps a dtype's name to the raw bytes (uint8, contiguous) of its tensors, which Ray's object store passes on
    without copying; `checksum` is that of the tensors (see `checksum`), `crc` that of each bucket's bytes, in their order.
    """

    version: int
    buckets: Mapping[str, np.ndarray]
    index: tuple[Entry, ...]
    checksum: int
    crc: Mapping[str, int]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one weight sync did, by which `transport` ("object", "broadcast" or "ipc", see publish). `phases` are seconds
    per phase; `checksum_ok` says that the engine's own parameters, as its kernels got them, sum to the sender's checksum."""

    version: int
    bytes: int
    seconds: float
    checksum_ok: bool
    phases: Mapping[str, float]
    transport: str


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Sum of all elements' raw bit patterns (uint32 of fp32, uint16 of bf16 and fp16) modulo 2^64.

    Does not change if tensors are split, joined, transposed, reordered or padded with zeros, so an engine that fuses
    parameters can be compared with the model they came from.
    """
    return sum(_bit_sum(tensor.detach()) for tensor in tensors) % (1 << 64)


def placed_sum(tensor: torch.Tensor) -> int:
    """Sum of all elements' bit patterns, each times 2 i + 1 for its place i, modulo 2^64; 0.0 and -0.0 count as one.

    Unlike `checksum` it changes if a matrix is transposed or two experts change places: it compares a tensor with itself.
    """
    flat = tensor.detach().contiguous().flatten()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    chunk = _CHUNK.get(flat.device.type, 1 << 22)
    for start in range(0, len(flat), chunk):
        part = (flat[start : start + chunk] + 0).view(_BITS[flat.element_size()]).long()
        total += (part * torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=flat.device)).sum()
    return int(total) % (1 << 64)


def _bit_sum(tensor: torch.Tensor) -> int:
    bits = tensor.view(_BITS[tensor.element_size()])
    if bits.device.type == "cpu":
        return int(bits.numpy().view(f"uint{8 * tensor.element_size()}").sum(dtype=np.uint64))
    negative = int((bits < 0).sum())  # torch sums the patterns as signed: each of these is 2^(its bits) too low
    return int(bits.sum(dtype=torch.int64)) + negative * (1 << 8 * tensor.element_size())


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The key of DTYPES for the `dtype` of the tensor `name`. Raises ValueError for a dtype other than those."""
    found = str(dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise ValueError(f"dtype of {name} must be one of {sorted(DTYPES)}, got {found}")
    return found


def pack(version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Weights:
    """Copy tensors (on any device) into one bucket per dtype.

    A tied tensor comes once, as in `Module.named_parameters()`. Raises ValueError for a negative version, a name that
    comes twice, or a dtype other than float32, bfloat16 and float16.
    """
    if version < 0:
        raise ValueError(f"version must be >= 0, got {version}")
    parts: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, int] = {}
    index: list[Entry] = []
    for name, tensor in named_tensors:
        dtype = dtype_name(name, tensor.dtype)
        index.append(Entry(name, dtype, tuple(tensor.shape), sizes.get(dtype, 0)))
        sizes[dtype] = sizes.get(dtype, 0) + tensor.numel()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        parts.setdefault(dtype, []).append(flat.view(torch.uint8).numpy())
    names = [entry.name for entry in index]
    if len(set(names)) < len(names):
        raise ValueError(f"each name must come once, got {sorted({name for name in names if names.count(name) > 1})} twice")
    buckets = {dtype: np.concatenate(arrays) for dtype, arrays in parts.items()}
    num_bytes = sum(bucket.nbytes for bucket in buckets.values())
    return Weights(version, buckets, tuple(index), checksum(_bucket_tensors(buckets).values()), _crc(buckets), num_bytes)


def unpack(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) as a view into the buckets. The views may be read-only memory: never write to them."""
    tensors = _bucket_tensors(weights.buckets)
    for entry in weights.index:
        size = int(np.prod(entry.shape, dtype=np.int64))
        yield entry.name, tensors[entry.dtype][entry.offset : entry.offset + size].view(entry.shape)


def verify(weights: Weights) -> None:
    """Raise ValueError unless the buckets still hold what was packed, each number in its place."""
    for dtype, found in _crc(weights.buckets).items():
        if found != weights.crc[dtype]:
            expected = f"{weights.crc[dtype]:#010x}"
            raise ValueError(f"checksum of weights version {weights.version} must be {expected}, got {found:#010x} ({dtype})")


def out_of_place(engine: str, name: str, version: int) -> ValueError:
    """The error of an engine in which a sync of the very version that it has would change a parameter."""
    return ValueError(
        f"rollout.engine={engine}: {name} must hold the same numbers in the same places after a sync of version {version}, which "
        "the engine had before, and does not: weights are sent, or taken, out of place. Choose another rollout.engine or "
        "model.policy"
    )


def _crc(buckets: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {dtype: zlib.crc32(bucket.data) for dtype, bucket in buckets.items()}


def _bucket_tensors(buckets: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return {dtype: torch.from_numpy(bucket).view(DTYPES[dtype]) for dtype, bucket in buckets.items()}
