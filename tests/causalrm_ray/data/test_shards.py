"""Shards: rows keep their order and their digest, faulty ones leave both files alike, a split that says nothing is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from causalrm_ray.data.embeddings import load_pair
from causalrm_ray.data.graded import GradedRow, Split
from causalrm_ray.data.rows import Quarantine
from causalrm_ray.data.shards import RowShards, conclude, read_states, write_rows, write_states
from causalrm_ray.errors import InputError


def rows(split: Split, count: int) -> list[GradedRow]:
    return [GradedRow(split, f"p{number}", f"{split} {number}", number % 3, "file", number + 1) for number in range(count)]


ROWS = [row for pair in zip(rows("train", 7), [*rows("test", 5), *rows("test", 2)], strict=True) for row in pair]  # mixed


def states_of(shards: RowShards, folder: Path, bad: tuple[str, ...] = ()) -> None:
    """A state for each row that shows its number and split; the answers in `bad` have a fault."""
    for name in shards.names:
        texts = pq.read_table(shards.folder / name)["response"].to_pylist()
        states = [[float(text.split()[1]), float(text.startswith("train"))] for text in texts]
        write_states(folder / name, np.array(states, np.float16), ["too long" if text in bad else "" for text in texts])


def test_rows_are_cut_into_shards_in_their_order(tmp_path: Path) -> None:
    shards = write_rows(ROWS, tmp_path / "rows", shard_rows=3)
    sizes = {name: pq.read_table(tmp_path / "rows" / name).num_rows for name in shards.names}
    assert list(sizes.items()) == [
        (f"{split}-0000{n}.parquet", size) for split in ("train", "test") for n, size in enumerate((3, 3, 1))
    ]
    assert shards.counts == {"train": 7, "test": 7}
    table = pq.read_table([tmp_path / "rows" / name for name in shards.names[:3]])
    assert table["response"].to_pylist() == [f"train {number}" for number in range(7)]
    assert table["row"].to_pylist() == list(range(1, 8))


def test_the_digest_is_that_of_what_is_embedded(tmp_path: Path) -> None:
    digest = write_rows(ROWS, tmp_path / "rows", 3).digest
    assert write_rows(ROWS, tmp_path / "again", 4).digest == digest
    for change in ({"response": "x"}, {"prompt": "x"}, {"level": 9}):
        other = [GradedRow(**{**{name: getattr(ROWS[0], name) for name in GradedRow.__slots__}, **change}), *ROWS[1:]]
        assert write_rows(other, tmp_path / "other", 3).digest != digest


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_states_come_back_as_written(precision: str, tmp_path: Path) -> None:
    states = np.random.default_rng(0).standard_normal((5, 3)).astype(precision)
    write_states(tmp_path / "a" / "s.parquet", states, ["", "x", "", "", ""])
    found, faults = read_states(tmp_path / "a" / "s.parquet")
    assert found.dtype == states.dtype
    assert np.array_equal(found, states)
    assert faults == ["", "x", "", "", ""]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["s.parquet"]


def test_the_end_keeps_embeddings_labels_and_rows_in_one_order_without_the_faulty(tmp_path: Path) -> None:
    shards = write_rows(ROWS, tmp_path / "rows", 3)
    states_of(shards, tmp_path / "states", bad=("train 1", "test 4"))
    file = io.StringIO()
    (tmp_path / "out").mkdir()
    kept = conclude(shards, tmp_path / "states", tmp_path / "out", Quarantine(file))
    assert kept == {"train": 6, "test": 6}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rows.parquet", "test.safetensors", "train.safetensors"]
    table, numbers = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist(), {}
    for split in ("train", "test"):
        own = [row for row in table if row["split"] == split]
        tensors = load_file(tmp_path / "out" / f"{split}.safetensors")
        assert tensors["embeddings"][:, 0].tolist() == [float(row["response"].split()[1]) for row in own]
        assert set(tensors["embeddings"][:, 1].tolist()) == {float(split == "train")}
        assert tensors["labels"].tolist() == [row["level"] for row in own]
        assert tensors["prompts"].dtype == np.int64
        numbers[split] = dict(zip((row["prompt"] for row in own), tensors["prompts"].tolist(), strict=True))
        assert [numbers[split][row["prompt"]] for row in own] == tensors["prompts"].tolist()
    assert numbers["train"] == {"p0": 0, "p2": 1, "p3": 2, "p4": 3, "p5": 4, "p6": 5}
    assert numbers["test"] == {"p0": 0, "p1": 6, "p2": 1, "p3": 2}  # without test 4
    train, _ = load_pair(tmp_path / "out" / "train.safetensors", tmp_path / "out" / "test.safetensors")
    assert train.levels.tolist() == [0, 2, 0, 1, 2, 0]
    entries = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [(entry["source"], entry["row"], entry["reason"]) for entry in entries] == [
        ("file", 2, "too long"),
        ("file", 5, "too long"),
    ]
    assert json.loads(entries[0]["raw"]) == {"prompt": "p1", "response": "train 1", "level": 1.0}


def test_a_split_that_says_nothing_is_refused_before_and_after(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the test split must hold at least two levels, got \[\] in 0 rows"):
        write_rows(rows("train", 4), tmp_path / "rows", 3)
    shards = write_rows([*rows("train", 2), *rows("test", 2)], tmp_path / "rows", 3)
    states_of(shards, tmp_path / "states", bad=("train 1",))
    with pytest.raises(InputError, match=r"the train split must .* got \[0.0\] in 1 rows; the first .*: file row 2: too long"):
        conclude(shards, tmp_path / "states", tmp_path, Quarantine(io.StringIO()))


def test_a_shard_of_other_rows_is_refused(tmp_path: Path) -> None:
    shards = write_rows([*rows("train", 2), *rows("test", 2)], tmp_path / "rows", 3)
    states_of(shards, tmp_path / "states")
    write_states(tmp_path / "states" / shards.names[0], np.zeros((1, 2), np.float16), [""])
    with pytest.raises(InputError, match=r"must hold the 2 rows of .*train-00000.parquet, got 1: remove it"):
        conclude(shards, tmp_path / "states", tmp_path, Quarantine(io.StringIO()))
