"""Rows of Parquet files and of `datasets`, in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from causalrm_ray.data.parquet import PARQUET_FAULTS
from causalrm_ray.data.readers.files import File, readable
from causalrm_ray.data.readers.part import Part
from causalrm_ray.data.rows import RawRow, SourceError

_ROWS_PER_BATCH = 1_000


class ParquetPart(Part):
    """A Parquet file, its checksums compared where it has any."""

    def __init__(self, file: File) -> None:
        super().__init__(file.where)
        self._file = file

    def rows(self) -> Iterator[RawRow]:
        return self._read(None)

    def suspects(self, columns: Collection[str]) -> Iterator[RawRow]:
        """All rows, but of these columns only."""
        return self._read(columns)

    def _open(self) -> pq.ParquetFile:
        with readable(self.where, "a readable Parquet file"):
            return pq.ParquetFile(self._file.open_seekable(), page_checksum_verification=True)

    def _read(self, columns: Collection[str] | None) -> Iterator[RawRow]:
        with readable(self.where, "a readable Parquet file"), self._open() as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [name for name in names if name in columns]
            if wanted != []:
                yield from numbered(self.where, file.iter_batches(_ROWS_PER_BATCH, columns=wanted), self._file.partition)


class DatasetPart(Part):
    """A split of a folder that `Dataset.save_to_disk` wrote, or of a data set on the hub."""

    def __init__(self, source: str, split: str, saved: bool) -> None:
        super().__init__(source)
        self._split, self._saved = split, saved

    def rows(self) -> Iterator[RawRow]:
        try:
            found = load_from_disk(self.where) if self._saved else load_dataset(self.where, split=self._split)
            dataset = found if isinstance(found, Dataset) else found[self._split]
            yield from numbered(self.where, dataset.with_format("arrow").iter(_ROWS_PER_BATCH), {})
        except (*PARQUET_FAULTS, KeyError, TypeError, DatasetGenerationError) as error:
            what = "a `datasets` folder" if self._saved else "a data set on the hub"
            raise SourceError(
                f"{self.where} must be {what} with the split {self._split!r}: {type(error).__name__}: {error}"
            ) from error


def numbered(where: str, batches: Iterable[pa.RecordBatch | pa.Table], more: Any) -> Iterator[RawRow]:
    """The rows of Arrow batches, each with the columns `more`."""
    number = 0
    for batch in batches:
        for fields in _plain(batch).to_pylist(maps_as_pydicts="lossy"):
            number += 1
            yield RawRow(where, number, None, {**fields, **more})


def _plain(batch: pa.RecordBatch | pa.Table) -> pa.Table:
    """The same rows with decimals as floats, and dates and bytes as text."""
    table = pa.table(batch) if isinstance(batch, pa.RecordBatch) else batch
    for place, field in enumerate(table.schema):
        kind = pa.types.is_decimal(field.type) and pa.float64()
        kind = kind or ((pa.types.is_date(field.type) or pa.types.is_binary(field.type)) and pa.string())
        if kind:
            table = table.set_column(place, field.name, table[field.name].cast(kind))
    return table
