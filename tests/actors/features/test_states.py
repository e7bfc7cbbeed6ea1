"""The features role: it computes what is missing, once, and goes on from the last whole shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from actors.features import states
from actors.features.states import FeaturesActor, StatesDone
from causalrm_ray.data.states.cache import StateCache, row_keys
from causalrm_ray.errors import InputError
from causalrm_ray.models.states.pooled import STATES, PooledBackbone, pooled_states
from causalrm_ray.models.states.rows import RowReader
from causalrm_ray.models.text import load_tokenizer


def finish(actor: FeaturesActor, snapshot: Path) -> StatesDone:
    while (done := actor.advance(snapshot)).rows < done.missing:
        pass
    return done


def texts(snapshot: Path) -> list[list[str]]:
    table = pq.read_table(snapshot, columns=list(states.READ))
    return [table[name].to_pylist() for name in states.READ]


def test_states_of_a_snapshot_are_the_backbones_and_only_new_rows_are_computed(
    backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path
) -> None:
    actor, folder = FeaturesActor(backbone, tmp_path / "states", max_length=64), tmp_path / "states"
    first = finish(actor, make_snapshot(30))
    assert (first.rows, first.missing) == (30, 30)
    grown = make_snapshot(40)
    again = finish(actor, grown)
    assert (again.rows, again.missing) == (10, 10)
    assert finish(FeaturesActor(backbone, folder, max_length=64), grown) == StatesDone(0, 0, 0)

    columns, reader = texts(grown), RowReader(load_tokenizer(backbone), 64, "refuse")
    rows = [reader.read(*row).row for row in zip(*columns, strict=True)]
    assert first.tokens + again.tokens == sum(len(row.prompt) + len(row.answer) for row in rows)
    cache, keys = StateCache(folder), row_keys(*columns)[0]
    expected = pooled_states(PooledBackbone.from_pretrained(backbone), rows)
    for place, name in enumerate(STATES):  # float16 keeps 11 bits
        torch.testing.assert_close(cache.states(name, keys), expected[:, place], atol=1e-3, rtol=1e-3)
    ids, lengths = cache.tokens(keys)
    assert ids.tolist() == [token for row in rows for token in (*row.prompt, *row.answer)]
    assert cache.counts(keys)["prompt_tokens"].tolist() == [len(row.prompt) for row in rows]
    assert len(lengths) == 40


def test_a_role_that_died_in_a_shard_loses_that_shard_only(
    backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SHARD_ROWS", 8)
    monkeypatch.setattr(states, "HEARTBEAT_S", 0.0)  # each batch answers
    snapshot, folder = make_snapshot(30), tmp_path / "states"
    actor = FeaturesActor(backbone, folder, max_length=64)
    while actor.advance(snapshot).rows <= 16:
        pass
    del actor  # in the middle of its third shard
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert finish(FeaturesActor(backbone, folder, max_length=64), snapshot).missing == 30 - 16
    whole = tmp_path / "whole"
    finish(FeaturesActor(backbone, whole, max_length=64), snapshot)
    keys = row_keys(*texts(snapshot))[0]
    for name in STATES:
        torch.testing.assert_close(
            StateCache(folder).states(name, keys), StateCache(whole).states(name, keys), atol=1e-3, rtol=1e-3
        )


def test_several_actors_share_the_rows_and_lack_none(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path) -> None:
    snapshot, folder = make_snapshot(40), tmp_path / "states"
    actors = [FeaturesActor(backbone, folder, max_length=64, part=part, parts=3) for part in range(3)]
    missing = [finish(actor, snapshot).missing for actor in actors]
    assert sum(missing) == 40
    assert min(missing) > 0
    assert row_keys(*texts(snapshot))[0] in StateCache(folder)


def test_threads_are_as_before(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    finish(FeaturesActor(backbone, tmp_path / "states", max_length=64), make_snapshot(10))
    assert torch.get_num_threads() == before


def test_a_row_that_is_too_long_is_named_each_time(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path) -> None:
    actor, snapshot = FeaturesActor(backbone, tmp_path / "states", max_length=64), make_snapshot(20, tail=" stone" * 70)
    for _ in range(2):
        with pytest.raises(InputError, match=r"impression 'impression-19' must have at most 64 tokens"):
            finish(actor, snapshot)


def test_states_in_bfloat16_are_near_those_in_float32(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path) -> None:
    snapshot, keys = make_snapshot(20), None
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        finish(FeaturesActor(backbone, folder, max_length=64, dtype=dtype), snapshot)
        keys = row_keys(*texts(snapshot))[0] if keys is None else keys
        found.append(StateCache(folder).states("final-mean", keys))
    scale = float(np.sqrt(found[0].square().mean()))
    assert 0 < float((found[0] - found[1]).abs().max()) < 0.05 * scale * 4
