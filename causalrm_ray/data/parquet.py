"""Parquet files with a checksum of every page, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

# What pyarrow raises for a file that is no Parquet or a damaged one; ValueError covers text that is no UTF-8.
PARQUET_FAULTS = (OSError, ValueError, OverflowError, pa.ArrowException)
CHECKSUMS: Mapping[str, Any] = {"write_page_checksum": True}
ROW_GROUP_BYTES, MOST_ROWS = 64 * 2**20, 2**20


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table, whole or not at all, with a checksum of every page."""
    write_whole(path, lambda unfinished: pq.write_table(table, unfinished, **CHECKSUMS))


def read_parquet(path: Path, what: str = "a readable Parquet file") -> pa.Table:
    """A table, its checksums compared where it has any. Raises InputError that says the file must be `what`."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except PARQUET_FAULTS as error:
        raise InputError(f"{path} must be {what}: {error}") from error


def write_batches_as(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path, row_group: int = ROW_GROUP_BYTES) -> None:
    """Write record batches as they come, whole or not at all, with a checksum of every page; row groups of about `row_group`
    bytes in memory, which a reader needs at once."""

    def write(unfinished: Path) -> None:
        with pq.ParquetWriter(unfinished, schema, **CHECKSUMS) as file:
            group: list[pa.RecordBatch] = []
            size = 0
            for batch in batches:
                group.append(batch)
                size += batch.nbytes
                if size >= row_group:
                    file.write_table(pa.Table.from_batches(group, schema), row_group_size=MOST_ROWS)
                    group, size = [], 0
            file.write_table(pa.Table.from_batches(group, schema), row_group_size=MOST_ROWS)

    write_whole(path, write)


def read_batches_of(
    path: Path, columns: Sequence[str] | None, rows: int, what: str = "a readable Parquet file"
) -> Iterator[pa.RecordBatch]:
    """Batches of at most `rows` rows of some columns (None: all), checksums compared. Raises InputError as read_parquet does."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(rows, columns=None if columns is None else list(columns))
    except PARQUET_FAULTS as error:
        raise InputError(f"{path} must be {what}: {error}") from error
