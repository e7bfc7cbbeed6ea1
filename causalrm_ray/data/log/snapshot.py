"""Snapshots of the feedback log: one row per impression, as Arrow in memory and Parquet on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from causalrm_ray.data.parquet import read_parquet, write_parquet
from causalrm_ray.errors import InputError

SNAPSHOT_SCHEMA = pa.schema(
    [
        ("impression_id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("observed", pa.int8()),
        ("label", pa.int8()),
        ("signal", pa.string()),
        ("policy_version", pa.int64()),
        ("time", pa.float64()),
        ("user", pa.string()),
        ("context", pa.string()),
        ("conversation_id", pa.string()),
        ("model", pa.string()),
        ("logprob", pa.float64()),
        ("asked_for_feedback", pa.int8()),
    ]
)
_NULLABLE = ("label", "signal", "user", "conversation_id", "model", "logprob", "asked_for_feedback")


class SnapshotError(InputError):
    """A snapshot that cannot be used: names the column, the rule and the value."""


def write_snapshot(dataset: Dataset, path: str | Path) -> None:
    """Write a snapshot as Parquet: readers see the old file or the whole new one. Raises SnapshotError as read_snapshot does."""
    write_parquet(_checked(_arrow(dataset), "the snapshot"), Path(path))


def read_snapshot(path: str | Path) -> Dataset:
    """A snapshot from Parquet.

    Raises SnapshotError if the file is unreadable, a column is missing, unknown or of another type, an id is empty or repeated, a
    text is empty, a time is not finite, or `label` and `signal` are not given exactly where `observed` is 1.
    """
    try:
        table = read_parquet(Path(path))
    except InputError as error:
        raise SnapshotError(f"snapshot {error}") from error
    return Dataset(_checked(table, f"snapshot {path}"))


def check_log(dataset: Dataset) -> None:
    """Raise SnapshotError unless a reward model can be fitted on this snapshot: some rows, some with feedback and some
    without, both labels.
    """
    rows = len(dataset)
    if rows == 0:
        raise SnapshotError("the feedback log must hold impressions, got 0 rows")
    columns = _arrow(dataset.select_columns(["observed", "label"]))
    observed = int(columns["observed"].to_numpy().sum())
    positive = int(columns["label"].fill_null(0).to_numpy().sum())
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
            f" in {observed} observed of {rows} rows"
        )


def _arrow(dataset: Any) -> pa.Table:
    table: Any = dataset.with_format("arrow")[:]  # unlike dataset.data, this follows a selection of rows
    return table


def _checked(table: pa.Table, name: str) -> pa.Table:
    """The table under SNAPSHOT_SCHEMA, or a SnapshotError."""
    for field in SNAPSHOT_SCHEMA:
        if field.name not in table.column_names:
            raise SnapshotError(f"{name} must have the column {field.name!r}, got {table.column_names}")
        if table.schema.field(field.name).type != field.type:
            raise SnapshotError(f"{name}: {field.name} must be {field.type}, got {table.schema.field(field.name).type}")
        nulls = table[field.name].null_count
        if nulls and field.name not in _NULLABLE:
            raise SnapshotError(f"{name}: {field.name} must be given in every row, got {nulls} nulls")
    unknown = sorted(set(table.column_names) - set(SNAPSHOT_SCHEMA.names))
    if unknown:
        raise SnapshotError(f"{name} must have only the columns {SNAPSHOT_SCHEMA.names}, got also {unknown}")
    _check_values(table, name)
    return table.select(SNAPSHOT_SCHEMA.names).cast(SNAPSHOT_SCHEMA)


def _check_values(table: pa.Table, name: str) -> None:
    observed, time = table["observed"].to_numpy(), table["time"].to_numpy()
    label = table["label"].fill_null(0).to_numpy()
    rules = [
        ("observed", "be 0 or 1", (observed == 0) | (observed == 1)),
        ("label", "be given exactly where observed is 1", table["label"].is_valid().to_numpy() == observed),
        ("label", "be 0 or 1", (label == 0) | (label == 1)),
        ("signal", "be given exactly where observed is 1", table["signal"].is_valid().to_numpy() == observed),
        ("time", "be finite and at least 0", np.isfinite(time) & (time >= 0)),
        *((text, "not be empty", table[text].to_numpy() != "") for text in ("impression_id", "prompt", "response")),
    ]
    for column, rule, holds in rules:
        if not holds.all():
            row = int(np.argmin(holds))
            got = {other: table[other][row].as_py() for other in dict.fromkeys((column, "observed"))}
            raise SnapshotError(f"{name}: {column} must {rule}, got {got} in row {row}")
    ids = len(set(table["impression_id"].to_pylist()))
    if ids != table.num_rows:
        raise SnapshotError(f"{name}: impression_id must not repeat, got {ids} different ids in {table.num_rows} rows")
