"""A log on disk in parts that never change, and snapshots of it that repeat no text.

segments/FROM-TO.parquet   the impressions at positions in (FROM, TO] of the log, in the order of their positions
snapshots/NAME.parquet     of each impression with feedback: its position, label and signal; the header names the segments

A snapshot of a million rows of which a hundredth is new writes that hundredth, and the labels of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from causalrm_ray.data.parquet import PARQUET_FAULTS, read_batches_of, read_parquet, write_batches_as
from causalrm_ray.errors import InputError

SEGMENTS = "segments"
IMPRESSION_COLUMNS = (
    ("impression_id", pa.string()),
    ("prompt", pa.string()),
    ("response", pa.string()),
    ("policy_version", pa.int64()),
    ("time", pa.float64()),
    ("user", pa.string()),
    ("context", pa.string()),
    ("conversation_id", pa.string()),
    ("model", pa.string()),
    ("logprob", pa.float64()),
    ("asked_for_feedback", pa.int8()),
)
SEGMENT_SCHEMA = pa.schema([("seq", pa.int64()), *IMPRESSION_COLUMNS])
LABEL_SCHEMA = pa.schema([("seq", pa.int64()), ("label", pa.int8()), ("signal", pa.dictionary(pa.int32(), pa.string()))])
_HEADER = b"causalrm"


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """`after` < positions <= `upto`, of which `rows` are impressions; `digest` is that of the last one in the log, `forgotten`
    how many rows the log had lost for ever by then."""

    after: int
    upto: int
    rows: int
    digest: str
    forgotten: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.after:015d}-{self.upto:015d}.parquet"


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """A snapshot at `position` of the log, as of a time (None: no limit), under `rule` (a digest of what signals mean).

    `newest` are the digests of the newest rows in the log then, `forgotten` how many it had lost for ever.
    """

    segments: tuple[str, ...]
    position: int
    newest: tuple[str | None, ...]
    forgotten: int
    as_of: float | None
    rule: str


def write_segment(batches: Iterable[pa.RecordBatch], header: SegmentHeader, folder: Path) -> None:
    """Write a segment, whole or not at all."""
    write_batches_as(batches, _with_header(SEGMENT_SCHEMA, header), folder / header.name)


def segment_headers(folder: Path) -> dict[Path, SegmentHeader | None]:
    """The headers of all segments in a folder, by their positions; None for a file that cannot be read."""
    found: dict[Path, SegmentHeader | None] = {}
    for path in sorted(folder.glob("*.parquet")):
        found[path] = None
        with suppress(InputError):
            if header := _header(path):
                found[path] = SegmentHeader(**header)
    return found


def write_labels(labels: pa.Table, header: SnapshotHeader, path: Path) -> None:
    """Write a snapshot: `labels` under LABEL_SCHEMA, ordered by position."""
    write_batches_as(labels.to_batches(), _with_header(LABEL_SCHEMA, header), path)


def read_labels(path: Path) -> pa.Table:
    """The labels of a snapshot under LABEL_SCHEMA."""
    return read_parquet(path, "a snapshot").cast(LABEL_SCHEMA)


def snapshot_header(path: Path) -> SnapshotHeader | None:
    """The header of a snapshot that is made of segments; None for a file that holds its rows itself."""
    found = _header(path)
    if found is None:
        return None
    found |= {name: tuple(found[name]) for name in ("segments", "newest")}
    return SnapshotHeader(**found)


def read_rows(path: Path, header: SnapshotHeader, columns: Sequence[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
    """A snapshot's impressions in the order of their positions, with what they got: at most `rows` at a time.

    `columns` are names of SNAPSHOT_SCHEMA, None: all. Raises InputError where a segment is missing or damaged.
    """
    labels = read_labels(path).combine_chunks()
    position = labels["seq"].to_numpy()
    at_place = np.append(position, -1)  # what stands where a position would be put: behind the last, nothing
    asked = [*SEGMENT_SCHEMA.names[1:], "observed", "label", "signal"] if columns is None else list(columns)
    needed = {*asked, "seq"} if header.as_of is None else {*asked, "seq", "time"}
    stored = [name for name in SEGMENT_SCHEMA.names if name in needed]
    whole = f"whole, for the snapshot {path} (a segment that is deleted is made again from the log)"
    for name in header.segments:
        for batch in read_batches_of(path.parent.parent / SEGMENTS / name, stored, rows, f"there, {whole}"):
            if header.as_of is not None:
                batch = batch.filter(pa.array(batch["time"].to_numpy() <= header.as_of))
            seq = batch["seq"].to_numpy()
            place = np.searchsorted(position, seq)
            observed = at_place[place] == seq
            got = labels.take(pa.array(place, pa.int64(), mask=~observed))
            arrays = {name: batch[name] for name in batch.schema.names}
            arrays["observed"] = pa.array(observed.astype(np.int8))
            arrays["label"], arrays["signal"] = got["label"].combine_chunks(), got["signal"].combine_chunks().cast(pa.string())
            yield pa.RecordBatch.from_arrays([arrays[name] for name in asked], names=asked)


def drop_unused(folder: Path) -> int:
    """Delete the snapshots of a run that miss a segment or cannot be read, and the segments that no other one names; returns how
    many snapshots."""
    named: set[str] = set()
    dropped = 0
    for path in (folder / "snapshots").glob("*.parquet"):
        try:
            header = snapshot_header(path)
        except InputError:
            drop_snapshot(path)
            continue
        if header is None:
            continue
        if all((folder / SEGMENTS / name).exists() for name in header.segments):
            named |= set(header.segments)
        else:
            drop_snapshot(path)
            dropped += 1
    for path in (folder / SEGMENTS).glob("*.parquet"):
        if path.name not in named:
            path.unlink()
    return dropped


def drop_snapshot(path: Path) -> None:
    """Delete a snapshot, or another file of a run, and the true preferences that were made for it, if any were."""
    path.unlink(missing_ok=True)
    for beside in (".labels.safetensors", ".judged.safetensors"):
        path.with_suffix(beside).unlink(missing_ok=True)


def _with_header(schema: pa.Schema, header: SegmentHeader | SnapshotHeader) -> pa.Schema:
    return schema.with_metadata({_HEADER: json.dumps(asdict(header)).encode()})


def _header(path: Path) -> dict[str, Any] | None:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except PARQUET_FAULTS as error:
        raise InputError(f"{path} must be a readable Parquet file: {error}") from error
    return json.loads(metadata[_HEADER]) if _HEADER in metadata else None
