"""The cache of states: what was written is read, by key, from whichever shard, and what is forgotten is gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from causalrm_ray.data.states import cache as module
from causalrm_ray.data.states.cache import StateCache, StateShard, forget_states, row_keys
from causalrm_ray.errors import InputError

NAMES = ("final-last", "middle-mean")


def shard(first: int, rows: int, scale: float = 1.0) -> StateShard:
    """Rows first..first + rows - 1, each of as many tokens as its number has, plus two."""
    numbers = range(first, first + rows)
    key, impression = keys(numbers)
    tokens = np.array([2 + number for number in numbers])
    counts = {"prompt_tokens": np.ones(rows), "tokens": tokens, "lost_turns": np.zeros(rows), "lost_tokens": np.zeros(rows)}
    ids = np.concatenate([np.full(count, number) for number, count in zip(numbers, tokens, strict=True)])
    states = {name: scale * values(numbers, place) for place, name in enumerate(NAMES)}
    return StateShard(key, impression, counts, ids, states)


def keys(numbers) -> tuple[np.ndarray, np.ndarray]:
    return row_keys(*([f"{what}{number}" for number in numbers] for what in ("i", "p", "r")))


def values(numbers, place: int) -> np.ndarray:
    return np.stack([np.arange(3) + 10 * number + 0.5 * place for number in numbers]).astype(np.float32)


@pytest.mark.parametrize("in_memory", [module.IN_MEMORY, 0])
def test_rows_are_read_by_key_from_all_shards_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", in_memory)  # 0: in a file
    first = StateCache(tmp_path)
    first.add(shard(0, 4))
    first.add(shard(4, 3))
    asked = [6, 0, 5, 3]
    for found in (first, StateCache(tmp_path)):
        key, _ = keys(asked)
        for place, name in enumerate(NAMES):
            assert torch.equal(found.states(name, key), torch.from_numpy(values(asked, place)))
        ids, lengths = found.tokens(key)
        assert lengths.tolist() == [8, 2, 7, 5]
        assert ids.tolist() == [6] * 8 + [0] * 2 + [5] * 7 + [3] * 5
        assert found.counts(key)["tokens"].tolist() == [8, 2, 7, 5]
        assert found.has(keys([2, 7])[0]).tolist() == [True, False]
    assert not list(tmp_path.glob(".*")), "a file without a name"


def test_what_float16_cannot_hold_is_scaled_by_a_power_of_two(tmp_path: Path) -> None:
    cache = StateCache(tmp_path)
    cache.add(shard(1, 3, scale=2.0**20))
    assert torch.equal(cache.states(NAMES[0], keys([1, 2, 3])[0]), torch.from_numpy(2.0**20 * values([1, 2, 3], 0)))


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = shard(0, 3)
    bad.states["middle-mean"][1, 2] = np.inf
    with pytest.raises(InputError, match="states must be finite, got middle-mean of row 1 of 3 with inf or nan"):
        StateCache(tmp_path).add(bad)
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_not_there_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    cache = StateCache(tmp_path)
    cache.add(shard(0, 2))
    with pytest.raises(InputError, match=r"must hold states of all 2 rows, got 1: give the command again"):
        cache.states(NAMES[0], keys([1, 9])[0])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"must be readable states: .*; remove it, and it is made again"):
        StateCache(tmp_path)


def test_another_text_under_the_same_id_is_another_row(tmp_path: Path) -> None:
    one, other = row_keys(["i", "i"], ["p", "p"], ["r", "R"])[0]
    assert one != other
    assert row_keys(["i"], ["p"], ["r"])[1] == row_keys(["i"], ["q"], ["R"])[1]


def test_what_is_forgotten_is_gone_from_all_states_below_a_cache(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cache = StateCache(tmp_path / "states" / name)
        cache.add(shard(0, 4))
        cache.add(shard(4, 3))
    open_before = StateCache(tmp_path / "states" / "a")
    (tmp_path / "states" / "a" / ".x.safetensors.7.tmp").write_text("of a process that was killed")
    assert forget_states(tmp_path, ["i1", "i5", "i77"]) == 4
    with pytest.raises(InputError, match="rows were forgotten meanwhile; give the command again"):
        open_before.states(NAMES[0], keys([2])[0])
    assert not list(tmp_path.rglob("*.tmp"))
    kept = StateCache(tmp_path / "states" / "a")
    assert kept.has(keys(range(7))[0]).tolist() == [True, False, True, True, True, False, True]
    asked = [0, 2, 3, 4, 6]
    assert torch.equal(kept.states(NAMES[1], keys(asked)[0]), torch.from_numpy(values(asked, 1)))
    assert kept.tokens(keys([3, 6])[0])[0].tolist() == [3] * 5 + [6] * 8
    for path in (tmp_path / "states").rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert not np.isin(file.get_tensor("impression"), keys([1, 5])[1]).any()
    assert forget_states(tmp_path, ["i1"]) == 0
