"""Packing weights: what goes in comes out, as views, and the checksum sees bits but not layout."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.weights import packing
from actors.weights.packing import checksum, pack, placed_sum, unpack, verify


def naive_checksum(values: list[float]) -> int:
    return sum(struct.unpack("<I", struct.pack("<f", value))[0] for value in values) % (1 << 64)


def test_checksum_is_the_sum_of_bit_patterns() -> None:
    # 1.0 is 0x3F800000 and -2.0 is 0xC0000000 in fp32; their upper halves are the bf16 patterns
    assert checksum([torch.tensor([1.0, -2.0])]) == 0x3F800000 + 0xC0000000
    assert checksum([torch.tensor([1.0, -2.0], dtype=torch.bfloat16)]) == 0x3F80 + 0xC000
    assert checksum([torch.tensor([1.0, -2.0], dtype=torch.float16)]) == 0x3C00 + 0xC000


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_checksum_equals_naive_loop(values: list[float]) -> None:
    assert checksum([torch.tensor(values, dtype=torch.float32)]) == naive_checksum(values)


def test_checksum_is_invariant_under_fusing_reordering_transposing_and_zero_padding() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(6, 4), torch.randn(2, 4)
    fused = torch.cat([key, query, torch.zeros(3, 4)])
    assert checksum([query, key]) == checksum([fused]) == checksum([fused.t()])


def test_checksum_changes_with_any_single_bit() -> None:
    tensor = torch.randn(5)
    flipped = (tensor.view(torch.int32) ^ torch.tensor([0, 0, 1, 0, 0], dtype=torch.int32)).view(torch.float32)
    assert checksum([tensor]) != checksum([flipped])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).to(torch.bfloat16),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(4, 3).t(),
        "empty": torch.empty(0, 3),
    }


def test_unpacked_equals_packed(tensors: dict[str, torch.Tensor]) -> None:
    weights = pack(3, tensors.items())
    unpacked = dict(unpack(weights))
    assert list(unpacked) == list(tensors)
    for name, tensor in tensors.items():
        assert unpacked[name].dtype == tensor.dtype
        assert torch.equal(unpacked[name], tensor)
    assert weights.version == 3
    assert weights.num_bytes == 4 * (12 + 1 + 12) + 2 * 5
    assert weights.checksum == checksum(tensors.values())
    verify(weights)


def test_unpack_copies_nothing_and_reads_read_only_memory(tensors: dict[str, torch.Tensor]) -> None:
    weights = pack(0, tensors.items())
    for bucket in weights.buckets.values():
        bucket.flags.writeable = False
    start = {dtype: bucket.ctypes.data for dtype, bucket in weights.buckets.items()}
    for entry, (_, tensor) in zip(weights.index, unpack(weights), strict=True):
        if tensor.numel():
            assert tensor.data_ptr() == start[entry.dtype] + entry.offset * tensor.element_size()


def test_corrupt_bucket_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    weights = pack(7, tensors.items())
    weights.buckets["float32"][17] ^= 4
    with pytest.raises(ValueError, match=r"checksum of weights version 7 must be 0x"):
        verify(weights)


@pytest.mark.parametrize("swapped", [(slice(0, 4), slice(4, 8)), (slice(8, 12), slice(40, 44))])
def test_numbers_that_changed_places_on_their_way_are_refused(swapped: tuple[slice, slice]) -> None:
    weights = pack(7, [("experts", torch.arange(24.0).reshape(2, 3, 4))])
    bucket, (one, other) = weights.buckets["float32"], swapped
    bucket[one], bucket[other] = bucket[other].copy(), bucket[one].copy()
    with pytest.raises(ValueError, match=r"checksum of weights version 7 must be 0x"):
        verify(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_sum_that_knows_places_is_that_of_a_naive_loop_and_changes_with_any_move(dtype: torch.dtype) -> None:
    experts = (10 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    bits = experts.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]).flatten().tolist()
    assert placed_sum(experts) == sum(value * (2 * place + 1) for place, value in enumerate(bits)) % (1 << 64)
    moved = (experts.transpose(1, 2), experts[[1, 0, 2]], experts.flip(2))
    assert len({placed_sum(value) for value in (experts, *moved)}) == 4
    assert placed_sum(torch.tensor([0.0])) == placed_sum(torch.tensor([-0.0])) == placed_sum(torch.empty(0)) == 0


def test_a_sum_that_knows_places_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    whole = placed_sum(values)
    monkeypatch.setattr(packing, "_CHUNK", {"cpu": 7})
    assert placed_sum(values) == whole


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"version must be >= 0, got -1"):
        pack(-1, [])
    with pytest.raises(ValueError, match=r"each name must come once, got \['w'\]"):
        pack(0, [("w", torch.zeros(1)), ("w", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"dtype of w must be one of .* got int64"):
        pack(0, [("w", torch.zeros(1, dtype=torch.int64))])


def test_later_change_of_the_model_leaves_packed_weights_alone() -> None:
    tensor = torch.ones(4)
    weights = pack(0, [("w", tensor)])
    tensor.zero_()
    assert np.array_equal(weights.buckets["float32"].view(np.float32), np.ones(4, np.float32))


def test_learner_side_imports_no_engine() -> None:
    load = "import sys, actors.weights.packing, actors.rollout.engine"
    check = f"{load}; sys.exit(bool({{'vllm', 'deepspeed', 'ray'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
