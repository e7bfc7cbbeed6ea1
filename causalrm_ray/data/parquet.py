"""Parquet files with a checksum of every page, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

# What pyarrow raises for a file that is no Parquet or a damaged one; ValueError covers text that is no UTF-8.
PARQUET_FAULTS = (OSError, ValueError, OverflowError, pa.ArrowException)
CHECKSUMS: Mapping[str, Any] = {"write_page_checksum": True}


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
