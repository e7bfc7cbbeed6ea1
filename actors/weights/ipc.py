"""Weights within one device: an engine maps the memory of a learner's rank on the same GPU and copies from it.

    rank: its parameters --handles on their memory--> Ray --> engine in another process: map, load, sum

Nothing is packed or sent. The handles are torch's own: CUDA IPC between processes on one GPU, files of shared memory on a CPU.
They hold as long as the rank lives, and what they show changes with its next step: an engine must be done by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing.reductions import reduce_storage, reduce_tensor

from actors.weights.packing import checksum, dtype_name

Handle = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]  # what to call with what, in another process


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """All parameters of one policy version, where they are; `checksum` is that of the tensors (see actors/weights/packing)."""

    version: int
    handles: tuple[tuple[str, Handle], ...]
    checksum: int
    num_bytes: int


Known = dict[str, tuple[tuple[Any, ...], Handle]]  # by name: where the tensor was, and its handle


def share(version: int, named_tensors: Iterable[tuple[str, torch.Tensor]], known: Known) -> SharedWeights:
    """Handles on tensors, which stay where they are; those of the version before are in `known`, and are kept there.

    Raises ValueError for a dtype other than float32, bfloat16 and float16.
    """
    tensors = {name: tensor.detach() for name, tensor in named_tensors}
    for name, tensor in tensors.items():
        dtype_name(name, tensor.dtype)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()  # other processes do not wait for this one's kernels
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    handles = tuple((name, _handle(name, tensor, known)) for name, tensor in tensors.items())
    return SharedWeights(version, handles, checksum(tensors.values()), num_bytes)


def attach(shared: SharedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor), mapped, not copied: never write to them, and drop them soon."""
    for name, (rebuild, arguments) in shared.handles:
        yield name, rebuild(*arguments)


def _handle(name: str, tensor: torch.Tensor, known: Known) -> Handle:
    if tensor.is_cuda:
        address = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if name not in known or known[name][0] != address:  # torch never forgets what it handed out: once is enough
            rebuild, arguments = reduce_tensor(tensor)
            known[name] = address, (rebuild, (*arguments[:-1], False))  # no event to wait for: `share` has synchronised
        return known[name][1]
    torch.multiprocessing.set_sharing_strategy("file_system")  # names of files can travel, open ones cannot
    rebuild, arguments = reduce_storage(tensor.untyped_storage())
    return _view, (rebuild, arguments, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _view(
    rebuild: Callable[..., Any],
    arguments: tuple[Any, ...],
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype).set_(rebuild(*arguments), offset, shape, stride)
