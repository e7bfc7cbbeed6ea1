"""Snapshots of the feedback log: one row per impression, as Arrow in memory and Parquet on disk.

batches --write_batches--> Parquet --read_batches--> batches        each row is checked on both ways; no column is ever whole
What reads a snapshot reads one that is made of segments (see data.snapshots.segments), too.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from causalrm_ray.data.parquet import read_batches_of, write_batches_as
from causalrm_ray.data.snapshots.segments import IMPRESSION_COLUMNS, read_rows, snapshot_header
from causalrm_ray.data.users.clusters import digest
from causalrm_ray.errors import InputError

SNAPSHOT_SCHEMA = pa.schema(
    [
        *IMPRESSION_COLUMNS[:3],
        ("observed", pa.int8()),
        ("label", pa.int8()),
        ("signal", pa.string()),
        *IMPRESSION_COLUMNS[3:],
    ]
)
_NULLABLE = ("label", "signal", "user", "conversation_id", "model", "logprob", "asked_for_feedback")
ROWS = 4096  # of a batch: few enough that their texts stay far below 2 GiB


class SnapshotError(InputError):
    """A snapshot that cannot be used: names the column, the rule and the value."""


def write_snapshot(dataset: Dataset, path: str | Path) -> None:
    """Write a snapshot as Parquet: readers see the old file or the whole new one. Raises SnapshotError as read_snapshot does."""
    write_batches(_batches(dataset), path)


def write_batches(batches: Iterable[pa.RecordBatch], path: str | Path) -> None:
    """The same of record batches, each of less than 2 GiB of text, one after another: no more than two are in memory."""
    write_batches_as(_checked(batches, "the snapshot"), SNAPSHOT_SCHEMA, Path(path))


def read_snapshot(path: str | Path) -> Dataset:
    """A snapshot from Parquet, all of it in memory.

    Raises SnapshotError if the file is unreadable, a column is missing, unknown or of another type, an id is empty or repeated, a
    text is empty, a time is not finite, or `label` and `signal` are not given exactly where `observed` is 1.
    """
    return as_dataset(read_batches(path))


def as_dataset(batches: Iterable[pa.RecordBatch]) -> Dataset:
    """Batches under SNAPSHOT_SCHEMA as a dataset.

    Its fingerprint is a number of its own: the default one is a hash of the whole table, for which `datasets` joins each column
    into one array, and 2 GiB of text are too much for it.
    """
    return Dataset(pa.Table.from_batches(list(batches), SNAPSHOT_SCHEMA), fingerprint=secrets.token_hex(8))


def read_batches(path: str | Path) -> Iterator[pa.RecordBatch]:
    """The rows of a snapshot in their order, ROWS or fewer at a time. Raises SnapshotError as read_snapshot, whenever it comes to
    the fault: ids that repeat are seen at the end only."""
    yield from _checked(_read(Path(path), None), f"snapshot {path}")


def read_columns(path: str | Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a snapshot that was checked before."""
    yield from _read(Path(path), columns)


def value_at(path: str | Path, column: str, row: int) -> Any:
    """One value of a snapshot that was checked before."""
    for batch in read_columns(path, [column]):
        if row < batch.num_rows:
            return batch[column][row].as_py()
        row -= batch.num_rows
    raise IndexError(f"row must be in the snapshot, got {row} beyond it")


def check_snapshot(path: str | Path) -> None:
    """Raise SnapshotError unless a reward model can be fitted on a snapshot: some rows, some with feedback and some without, both
    labels; or as read_snapshot does."""
    rows = observed = positive = 0
    for batch in read_batches(path):
        rows += batch.num_rows
        observed += int(np.count_nonzero(batch["observed"].to_numpy()))
        positive += int(np.count_nonzero(batch["label"].fill_null(0).to_numpy()))
    check_counts(rows, observed, positive)


def check_counts(rows: int, observed: int, positive: int) -> None:
    """`check_snapshot` of a log's counts: rows, those with feedback, and those of label 1."""
    if rows == 0:
        raise SnapshotError("the feedback log must hold impressions, got 0 rows")
    if observed == 0:
        raise SnapshotError(f"the feedback log must hold feedback, got 0 observed of {rows} rows")
    if observed == rows:
        raise SnapshotError(
            f"the feedback log must hold what was shown without feedback too, got {rows} rows, all with feedback: who gives"
            " feedback can be learned from those who do not"
        )
    if positive in (0, observed):
        raise SnapshotError(
            f"feedback must hold both labels, got {positive} of label 1 and {observed - positive} of label 0"
            f" in {observed} observed of {rows} rows: import what users did {'not ' if positive else ''}like, too, as a signal of"
            " feedback.signals"
        )


def _read(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    try:
        header = snapshot_header(path)
        yield from read_rows(path, header, columns, ROWS) if header else read_batches_of(path, columns, ROWS)
    except InputError as error:
        raise SnapshotError(f"snapshot {error}") from error


def _batches(dataset: Any) -> Iterator[pa.RecordBatch]:
    """The rows of a dataset, whichever were selected from it, without its columns ever being whole."""
    tables: Any = dataset.with_format("arrow").iter(ROWS)
    for table in tables:
        yield from table.to_batches()


def _checked(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """The batches under SNAPSHOT_SCHEMA, or a SnapshotError."""
    rows, ids = 0, []
    for batch in batches:
        _check_columns(batch, name)
        _check_values(batch, name, rows)
        rows += batch.num_rows
        ids.append(digest("impression_id", batch["impression_id"].to_pylist()))
        yield batch.select(SNAPSHOT_SCHEMA.names).cast(SNAPSHOT_SCHEMA)
    different = len(np.unique(np.concatenate(ids))) if ids else 0
    if different != rows:
        raise SnapshotError(f"{name}: impression_id must not repeat, got {different} different ids in {rows} rows")


def _check_columns(batch: pa.RecordBatch, name: str) -> None:
    given = batch.schema.names
    for field in SNAPSHOT_SCHEMA:
        if field.name not in given:
            raise SnapshotError(f"{name} must have the column {field.name!r}, got {given}")
        found = batch.schema.field(field.name).type
        if found != field.type and not (pa.types.is_large_string(found) and field.type == pa.string()):
            raise SnapshotError(f"{name}: {field.name} must be {field.type}, got {found}")
        nulls = batch[field.name].null_count
        if nulls and field.name not in _NULLABLE:
            raise SnapshotError(f"{name}: {field.name} must be given in every row, got {nulls} nulls")
    unknown = sorted(set(given) - set(SNAPSHOT_SCHEMA.names))
    if unknown:
        raise SnapshotError(f"{name} must have only the columns {SNAPSHOT_SCHEMA.names}, got also {unknown}")


def _check_values(batch: pa.RecordBatch, name: str, before: int) -> None:
    """`before` rows came in earlier batches."""
    observed, time = batch["observed"].to_numpy(), batch["time"].to_numpy()
    label = batch["label"].fill_null(0).to_numpy(zero_copy_only=False)
    given = {column: batch[column].is_valid().to_numpy(zero_copy_only=False) for column in ("label", "signal")}
    rules = [
        ("observed", "be 0 or 1", (observed == 0) | (observed == 1)),
        ("label", "be given exactly where observed is 1", given["label"] == observed),
        ("label", "be 0 or 1", (label == 0) | (label == 1)),
        ("signal", "be given exactly where observed is 1", given["signal"] == observed),
        ("time", "be finite and at least 0", np.isfinite(time) & (time >= 0)),
        *(
            (text, "not be empty", pc.call_function("not_equal", [batch[text], ""]).to_numpy(zero_copy_only=False))
            for text in ("impression_id", "prompt", "response")
        ),
    ]
    for column, rule, holds in rules:
        if not holds.all():
            row = int(np.argmin(holds))
            got = {other: batch[other][row].as_py() for other in dict.fromkeys((column, "observed"))}
            raise SnapshotError(f"{name}: {column} must {rule}, got {got} in row {before + row}")
