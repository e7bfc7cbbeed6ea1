"""Numbered rows of a log kept elsewhere: a JSONL or Parquet file, a folder of them, a `datasets` folder or a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.parquet import PARQUET_FAULTS
from causalrm_ray.data.rows import RawRow, RowError, SourceError, conversation, row_fields
from causalrm_ray.errors import brief

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROWS_PER_BATCH = 1_000


def read_rows(source: str, split: str = "train") -> Iterator[RawRow]:
    """Every row of `source`; blank lines of JSONL are skipped.

    A folder is one that `Dataset.save_to_disk` wrote, or holds JSONL and Parquet files (read in the order of their names), or
    else goes to `datasets.load_dataset`, as does a name that is no path: a hub id. `split` matters for `datasets` only.
    Raises SourceError where the source is missing or unreadable as a whole.
    """
    path = Path(source)
    if path.is_file():
        yield from _file_rows(path)
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _dataset_rows(source, split, saved=True)
    elif files := data_files(path):
        for file in files:
            yield from _file_rows(file)
    else:
        yield from _dataset_rows(source, split, saved=False)


def data_files(folder: Path) -> list[Path]:
    """The JSONL and Parquet files below `folder`, by name; empty if it is no folder."""
    return sorted(file for file in folder.rglob("*") if file.suffix in (*JSONL_SUFFIXES, ".parquet"))


def read_prompts(source: str) -> list[Conversation]:
    """The `prompt` column of a source, texts or messages, in order.

    Raises SourceError that lists the faulty rows by number, or on no rows.
    """
    prompts, faults = [], []
    for row in read_rows(source):
        try:
            prompts.append(conversation(row_fields(row).get("prompt")))
        except RowError as error:
            faults.append(f"{row.where} row {row.number}: {error}")
    if faults:
        raise SourceError(f"every row of {source} must hold a prompt, got {len(faults)} faulty rows:\n" + "\n".join(faults[:10]))
    if not prompts:
        raise SourceError(f"{source} must hold prompts, got 0 rows")
    return prompts


def _file_rows(path: Path) -> Iterator[RawRow]:
    if path.suffix in JSONL_SUFFIXES:
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise SourceError(f"source {path} must end in one of {[*JSONL_SUFFIXES, '.parquet']}, got {path.suffix!r}")


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="backslashreplace").strip()
            if text:
                yield _json_row(str(path), number, line, text)


def _json_row(where: str, number: int, line: bytes, text: str) -> RawRow:
    try:
        line.decode()
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return RawRow(where, number, line, None, f"row must be JSON in UTF-8: {error}")
    if not isinstance(fields, dict):
        return RawRow(where, number, line, None, f"row must be a JSON object, got {brief(fields)}")
    return RawRow(where, number, line, fields)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from _numbered(str(path), file.iter_batches(_ROWS_PER_BATCH))
    except PARQUET_FAULTS as error:
        raise SourceError(f"source {path} must be a readable Parquet file: {error}") from error


def _dataset_rows(source: str, split: str, saved: bool) -> Iterator[RawRow]:
    try:
        dataset = load_from_disk(source) if saved else load_dataset(source, split=split)
        if not isinstance(dataset, Dataset):
            dataset = dataset[split]
        yield from _numbered(source, dataset.with_format("arrow").iter(_ROWS_PER_BATCH))
    except (*PARQUET_FAULTS, KeyError, TypeError, DatasetGenerationError) as error:
        raise SourceError(
            f"source {source} must be a JSONL or Parquet file, a folder of them, a `datasets` folder or a hub id with the split"
            f" {split!r}: {type(error).__name__}: {error}"
        ) from error


def _numbered(where: str, batches: Iterator[pa.RecordBatch | pa.Table]) -> Iterator[RawRow]:
    rows = (fields for batch in batches for fields in batch.to_pylist())
    for number, fields in enumerate(rows, 1):
        yield RawRow(where, number, None, fields)
