"""Graded rows as numbered Parquet shards, and the files that are made of them once each has its state.

GradedRow -> rows/train-00000.parquet ...                  `write_rows`: prompt, response, level, source, row
             states/train-00000.parquet ...                `write_states`: embedding [D], fault; line by line those of the rows
both      -> train.safetensors, test.safetensors, rows.parquet      `conclude`: without the rows that have a fault
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from causalrm_ray.data.embeddings import write_embeddings
from causalrm_ray.data.graded import GradedRow, Split
from causalrm_ray.data.parquet import CHECKSUMS, read_parquet, write_parquet
from causalrm_ray.data.rows import Quarantine
from causalrm_ray.errors import InputError

ROW_SCHEMA = pa.schema(
    [("prompt", pa.string()), ("response", pa.string()), ("level", pa.float32()), ("source", pa.string()), ("row", pa.int64())]
)
KEPT_SCHEMA = pa.schema([pa.field("split", pa.string()), *ROW_SCHEMA])
SPLIT_NAMES: tuple[Split, ...] = ("train", "test")


@dataclass
class RowShards:
    """Shards of rows in `folder`: their file names in order, how many rows each split has, and the digest of all of them."""

    folder: Path
    names: list[str] = field(default_factory=list)
    counts: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLIT_NAMES, 0))
    digest: str = ""


def write_rows(rows: Iterable[GradedRow], folder: Path, shard_rows: int) -> RowShards:
    """Cut the rows of each split, in their order, into shards of `shard_rows`; what `folder` held is gone.

    No more than a shard a split is held in memory. Raises InputError for a split without rows, or with one level only.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards = RowShards(folder)
    waiting: dict[Split, list[GradedRow]] = {name: [] for name in SPLIT_NAMES}
    digests = {name: hashlib.sha256() for name in SPLIT_NAMES}
    levels: dict[Split, set[float]] = {name: set() for name in SPLIT_NAMES}

    def flush(split: Split) -> None:
        if waiting[split]:
            name = f"{split}-{sum(other.startswith(split) for other in shards.names):05d}.parquet"
            columns = zip(*((row.prompt, row.response, row.level, row.where, row.number) for row in waiting[split]), strict=True)
            write_parquet(pa.table(dict(zip(ROW_SCHEMA.names, columns, strict=True)), ROW_SCHEMA), folder / name)
            shards.names.append(name)
            waiting[split].clear()

    for row in rows:
        split = row.split
        digests[split].update(json.dumps([row.prompt, row.response, row.level]).encode())
        shards.counts[split] += 1
        if len(levels[split]) < 2:
            levels[split].add(row.level)
        waiting[split].append(row)
        if len(waiting[split]) == shard_rows:
            flush(split)
    for split in SPLIT_NAMES:
        flush(split)
        _require_levels(split, levels[split], shards.counts[split])
    shards.names.sort(key=lambda name: (SPLIT_NAMES.index(_split(name)), name))
    shards.digest = hashlib.sha256("".join(digests[name].hexdigest() for name in SPLIT_NAMES).encode()).hexdigest()
    return shards


def write_states(path: Path, states: np.ndarray, faults: Sequence[str]) -> None:
    """Write a shard's states [N, D] and the fault of each row, "" where there is none: whole or not at all."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1])
    write_parquet(pa.table({"embedding": values, "fault": pa.array(faults, pa.string())}), path)


def read_states(path: Path) -> tuple[np.ndarray, list[str]]:
    """States [N, D] of a shard, as stored, and the fault of each row. Raises InputError for a damaged file."""
    table = read_parquet(path, "a shard of states that `embed` wrote (remove it, and it is made again)")
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1), table["fault"].to_pylist()


def conclude(shards: RowShards, states: Path, folder: Path, quarantine: Quarantine) -> dict[Split, int]:
    """Write rows.parquet and, for each split, embeddings [N, D], labels [N] and prompts [N] in its order; returns how many rows
    each has.

    Distinct prompts are numbered from 0, those of the test split after those of the train split. Rows with a fault go to
    `quarantine`. Raises InputError where none, or only one level, is left of a split.
    """
    kept: dict[Split, int] = {}
    numbers: dict[str, int] = {}
    with pq.ParquetWriter(folder / ".rows.parquet", KEPT_SCHEMA, **CHECKSUMS) as writer:
        for split in SPLIT_NAMES:
            found = [
                _good(shards.folder / name, states / name, quarantine, split, writer, numbers)
                for name in shards.names
                if _split(name) == split
            ]
            levels = np.concatenate([level for _, level, _ in found])
            kept[split] = len(levels)
            _require_levels(split, set(np.unique(levels).tolist()), len(levels), quarantine.first_fault)
            embeddings = np.concatenate([state for state, *_ in found])
            prompts = np.concatenate([prompt for *_, prompt in found])
            del found
            write_embeddings(folder / f"{split}.safetensors", embeddings, levels, prompts)
    (folder / ".rows.parquet").replace(folder / "rows.parquet")
    return kept


def _good(
    rows: Path, states: Path, quarantine: Quarantine, split: Split, writer: pq.ParquetWriter, numbers: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, levels and prompts of the rows of a shard that have no fault, which are written; the others are quarantined.

    `numbers` of prompts are added to.
    """
    table = read_parquet(rows)
    found, faults = read_states(states)
    if len(found) != len(table):
        raise InputError(f"{states} must hold the {len(table)} rows of {rows}, got {len(found)}: remove it, and it is made again")
    for row, fault in zip(table.to_pylist(), faults, strict=True):
        if fault:
            raw = json.dumps({name: row[name] for name in ("prompt", "response", "level")}, ensure_ascii=False)
            quarantine.refuse(row["source"], row["row"], fault, raw)
    good = np.array([not fault for fault in faults])
    table = table.filter(pa.array(good))
    writer.write_table(table.add_column(0, "split", pa.array([split] * len(table), pa.string())).cast(KEPT_SCHEMA))
    prompts = [numbers.setdefault(prompt, len(numbers)) for prompt in table["prompt"].to_pylist()]
    return found[good], table["level"].to_numpy(), np.array(prompts, np.int64)


def _split(name: str) -> Split:
    return "train" if name.startswith("train") else "test"


def _require_levels(split: Split, levels: set[float], rows: int, fault: str = "") -> None:
    if len(levels) < 2:
        first = f"; the first row that was quarantined: {fault}" if fault else ""
        raise InputError(f"the {split} split must hold at least two levels, got {sorted(levels)} in {rows} rows{first}")
