"""Labels of a few impressions that were drawn at random and judged with care, `feedback.clean`, matched to a snapshot of the log.

source --CleanSource.read--> {impression: label} --match_clean--> r* [N] of the snapshot's rows, nan where none was judged
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from causalrm_ray.config.train import FeedbackConfig
from causalrm_ray.data.log.values import Values
from causalrm_ray.data.readers.sql_part import READS
from causalrm_ray.data.rows import RawRow, RowError, SourceError, row_fields
from causalrm_ray.data.snapshots.table import read_columns
from causalrm_ray.data.sources import parts
from causalrm_ray.errors import brief

ID_COLUMNS = ("impression", "impression_id")
OPTION = "feedback.clean"


@dataclass(frozen=True)
class CleanSource:
    """Where judged rows are read from: files, a folder, a hub id or a URL, or a query on `database` where there is one."""

    source: str | Sequence[str]
    database: str | None = None

    def read(self) -> dict[str, int]:
        """The label, 0 or 1, of each judged impression.

        Raises SourceError, which names the row, for a source that is missing or empty, a row without an impression or with
        another label than 0 and 1, and an impression with both.
        """
        query = isinstance(self.source, str) and len(self.source.split()) > 1 and READS.match(self.source)  # no values.csv
        if self.database is not None and isinstance(self.source, str) and query:
            found = parts(self.database, query=self.source, option=OPTION)
        else:
            found = parts(self.source)
        values, labels = Values(time.time()), dict[str, int]()
        for part in found:
            for row in part.rows():
                impression, label = _judged(row, values)
                if labels.setdefault(impression, label) != label:
                    raise SourceError(
                        f"{OPTION}: {row.where} row {row.number}: impression {brief(impression)} must have one label, got 0 and"
                        " 1: settle it, or leave the impression out"
                    )
        if not labels:
            raise SourceError(f"{OPTION} must hold rows of impression and label, got 0 rows in {found[0].where}")
        return labels


@dataclass(frozen=True)
class CleanCounts:
    """Judged impressions that a snapshot holds, and those that it does not, of which `missing` is one."""

    matched: int
    unmatched: int
    missing: str | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a report may say of them: no id, which might be one that was forgotten."""
        if not self.unmatched:
            return ()
        rows = f"{self.unmatched} of {self.matched + self.unmatched} rows of {OPTION}"
        return (f"{rows} are of impressions that the log does not hold: they are left out.",)


def clean_source(config: FeedbackConfig) -> CleanSource | None:
    """What `feedback.clean` names, None where it names nothing."""
    if config.clean is None:
        return None
    return CleanSource(config.clean, config.source if config.query and isinstance(config.source, str) else None)


def match_clean(labels: Mapping[str, int], snapshot: Path) -> tuple[np.ndarray, CleanCounts]:
    """r* [N] of the snapshot's rows in their order, nan where none was judged. Raises SourceError where none of them was."""
    rows, seen = [], set[str]()
    for batch in read_columns(snapshot, ["impression_id"]):
        ids = batch["impression_id"].to_pylist()
        rows.append(np.array([labels.get(name, np.nan) for name in ids], dtype=np.float32))
        seen.update(name for name in ids if name in labels)
    missing = next((name for name in labels if name not in seen), None)
    if not seen:
        raise SourceError(
            f"{OPTION} must hold impressions of the log by their ids, got {len(labels)} ids of which the log holds none, the"
            f" first {brief(missing)}: log answers with `id` (feedback.columns.id=COLUMN), and name them by it"
        )
    return np.concatenate(rows), CleanCounts(len(seen), len(labels) - len(seen), missing)


def _judged(row: RawRow, values: Values) -> tuple[str, int]:
    try:
        fields = row_fields(row)
        name: Any = next((fields[column] for column in ID_COLUMNS if fields.get(column) is not None), None)
        if isinstance(name, bool) or not isinstance(name, int | str) or not str(name).strip():
            raise RowError(f"impression must be the id of an impression, a text or whole number, got {brief(name)}")
        label = values.label(fields.get("label"))
        if label is None:
            raise RowError("label must be 0 or 1, got none: leave out what was not judged")
    except RowError as error:
        raise SourceError(f"{OPTION}: {row.where} row {row.number}: {error}") from error
    return str(name), label
