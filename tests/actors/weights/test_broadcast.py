"""The group that weights are broadcast over: who sits where, what travels in which bucket, and what happens when one leaves."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from actors.cluster.ports import free_port
from actors.errors import LostPeerError
from actors.weights.broadcast import BroadcastGroup, Bucket, BucketLayout, GroupRank, join_group, make_layout, receive, send
from actors.weights.packing import Entry, checksum

CPU = torch.device("cpu")
TIMEOUT_S = 20.0
F32, BF16 = torch.float32, torch.bfloat16


def meet(size: int, timeout_s: float = TIMEOUT_S) -> list[GroupRank]:
    address = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    return [GroupRank(address, rank, size, timeout_s) for rank in range(size)]


def in_group(*members: Callable[[BroadcastGroup], Any]) -> list[Any]:
    """What each member returns or raises, each in a thread with a channel of its own; the first is rank 0."""

    def run(place: GroupRank, member: Callable[[BroadcastGroup], Any]) -> Any:
        channel = BroadcastGroup(place, CPU)
        try:
            return member(channel)
        finally:
            channel.close()

    with ThreadPoolExecutor(len(members)) as pool:
        done = [pool.submit(run, *each) for each in zip(meet(len(members)), members, strict=True)]
    return [future.exception() or future.result() for future in done]


def outline_of(tensors: dict[str, torch.Tensor], version: int, bucket_bytes: int) -> BucketLayout:
    return make_layout(version, ((name, value.dtype, tuple(value.shape)) for name, value in tensors.items()), bucket_bytes)


def sender(tensors: dict[str, torch.Tensor], layout: BucketLayout, version: int) -> Callable[[BroadcastGroup], None]:
    return lambda channel: send(channel, layout, iter(tensors.items()), version)


def taker(layout: BucketLayout, load: Callable[[Iterator[tuple[str, torch.Tensor]]], object]) -> Callable[[BroadcastGroup], int]:
    return lambda channel: receive(channel, layout, load)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(5),
        "large": torch.randn(20, 10),
        "half": torch.randn(6).to(BF16),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(4, 3).t(),
        "empty": torch.empty(0, 3),
    }


def test_buckets_by_hand() -> None:
    shapes = [("a", F32, (3, 4)), ("b", F32, (2, 2)), ("c", F32, ()), ("d", F32, (9, 2)), ("e", F32, (1,)), ("f", BF16, (8,))]
    layout = make_layout(3, shapes, bucket_bytes=64)
    assert layout.version == 3
    assert layout.buckets == (
        Bucket("float32", 16, (Entry("a", "float32", (3, 4), 0), Entry("b", "float32", (2, 2), 12))),  # 64 bytes: just full
        Bucket("float32", 1, (Entry("c", "float32", (), 0),)),
        Bucket("float32", 18, (Entry("d", "float32", (9, 2), 0),)),  # larger than a bucket: one of its own
        Bucket("float32", 1, (Entry("e", "float32", (1,), 0),)),
        Bucket("bfloat16", 8, (Entry("f", "bfloat16", (8,), 0),)),
    )
    assert layout.num_bytes == 4 * (16 + 1 + 18 + 1) + 2 * 8
    with pytest.raises(ValueError, match=r"dtype of w must be one of .* got int64"):
        make_layout(0, [("w", torch.int64, (1,))])


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_what_is_sent_arrives_and_may_be_kept(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    layout = outline_of(tensors, 7, bucket_bytes)
    kept: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    done = in_group(sender(tensors, layout, 7), *(taker(layout, mine.update) for mine in kept))
    assert done == [None, checksum(tensors.values()), checksum(tensors.values())]
    for mine in kept:
        assert list(mine) == list(tensors)
        assert all(torch.equal(mine[name], value) and mine[name].dtype == value.dtype for name, value in tensors.items())


def test_two_buckets_at_a_time_bound_memory_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"w{number}": torch.full((64,), float(number)) for number in range(12)}
    layout = outline_of(tensors, 0, 64 * 4)
    assert len(layout.buckets) == 12
    empty = Bucket.empty
    made: dict[int, list[weakref.ref]] = {}
    most: dict[int, int] = {}

    def counted(bucket: Bucket, device: torch.device) -> torch.Tensor:
        packed = empty(bucket, device)
        mine = made.setdefault(threading.get_ident(), [])
        mine.append(weakref.ref(packed))
        alive = sum(ref() is not None for ref in mine)
        most[threading.get_ident()] = max(alive, most.get(threading.get_ident(), 0))
        return packed

    monkeypatch.setattr(Bucket, "empty", counted)
    done = in_group(sender(tensors, layout, 0), taker(layout, dict))
    assert done[1] == checksum(tensors.values())
    assert len(most) == 2
    assert max(most.values()) <= 2 + 2  # each of gloo's two threads may hold one a moment longer


def test_a_receiver_that_fails_frees_the_others_and_each_error_says_where(tensors: dict[str, torch.Tensor]) -> None:
    layout = outline_of(tensors, 7, 1)
    left = threading.Event()

    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in tensors.items():
            if name == "half":
                assert left.wait(TIMEOUT_S)
            yield name, value

    def fail(channel: BroadcastGroup) -> None:
        try:
            receive(channel, layout, lambda named: 1 // 0)
        finally:
            left.set()

    began = time.monotonic()
    done = in_group(lambda channel: send(channel, layout, slow(), 7), taker(layout, dict), fail)
    assert time.monotonic() - began < TIMEOUT_S / 2
    assert isinstance(done[2], ZeroDivisionError)
    for error in done[:2]:
        assert isinstance(error, LostPeerError)
        assert "weight sync by broadcast" in str(error)
        assert "of version 7, rank" in str(error)


def test_another_version_or_order_than_announced_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    layout = outline_of(tensors, 3, 100)
    _, error = in_group(sender(tensors, layout, 4), taker(layout, dict))
    assert isinstance(error, ValueError)
    assert "weights of version 3 must come, got version 4" in str(error)
    swapped = {name: tensors[name] for name in ("b", "a", *list(tensors)[2:])}
    wrong, lost = in_group(sender(swapped, layout, 3), taker(layout, dict))
    assert isinstance(wrong, ValueError)
    assert "a (3, 4) must come next, got b (5,)" in str(wrong)
    assert isinstance(lost, LostPeerError)


def test_a_group_that_nobody_joins_is_given_up_by_name() -> None:
    place = meet(2, timeout_s=0.5)[0]
    with pytest.raises(LostPeerError, match=r"by broadcast, join, rank 0 of 2 at tcp://127.0.0.1:\d+, timeout_s=0.5: "):
        BroadcastGroup(place, CPU)


def test_a_place_is_taken_once_and_a_closed_channel_stays_closed() -> None:
    place, other = meet(1)[0], meet(1)[0]
    channel = join_group(None, place, CPU)
    assert join_group(channel, place, CPU) is channel
    moved = join_group(channel, other, CPU)
    assert moved.member == other
    with pytest.raises(LostPeerError, match="left after an earlier error"):
        channel.start(torch.zeros(1), "bucket 1 of 1 of version 0")
    moved.close()
