"""Memory that one process shows and another maps: the same bytes, no copy."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from actors.weights.ipc import SharedWeights, attach, share
from actors.weights.packing import checksum


def look(pipe: Connection) -> None:
    """In another process: map what comes, tell its sum, and tell it again when asked."""
    shared: SharedWeights = pipe.recv()
    tensors = dict(attach(shared))
    while True:
        pipe.send((checksum(tensors.values()), {name: tensor.tolist() for name, tensor in tensors.items()}))
        if not pipe.recv():
            return


def test_another_process_sees_the_same_memory() -> None:
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(6, 4))
    tensors = {"rows": whole[2:4], "transposed": whole.t(), "half": torch.randn(5).to(torch.bfloat16), "empty": torch.empty(0, 3)}
    shared = share(3, tensors.items(), {})
    assert (shared.version, shared.num_bytes) == (3, 4 * (8 + 24) + 2 * 5)
    assert shared.checksum == checksum(tensor.contiguous() for tensor in tensors.values())
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=look, args=(there,))
    other.start()
    here.send(shared)
    for again in (True, False):
        assert here.poll(60)
        assert here.recv() == (checksum(tensors.values()), {name: tensor.tolist() for name, tensor in tensors.items()})
        with torch.no_grad():
            whole.add_(1.0)  # seen there without being sent
        here.send(again)
    other.join(60)
    assert other.exitcode == 0


def test_only_what_engines_compute_in_is_shown() -> None:
    with pytest.raises(ValueError, match=r"dtype of w must be one of .* got int64"):
        share(0, [("w", torch.zeros(1, dtype=torch.int64))], {})
