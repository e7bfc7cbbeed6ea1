"""Sealing: what a log holds, into segments and a snapshot of them.

log --impressions that no segment holds--> segments --labels of what changed since the newest snapshot--> snapshot

Each row is verified once, before it is sealed. Segments are a cache: those that are not of this log, or hold what it has
forgotten since, are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from sqlalchemy import Connection, Engine, select

from causalrm_ray.data.erasure import Forgotten, erase_copies
from causalrm_ray.data.log.bulk import forgotten_of
from causalrm_ray.data.log.database import transact, verify
from causalrm_ray.data.log.sealing.queries import Known, LabelRule, label_query, new_label_query
from causalrm_ray.data.log.tables import LogTables
from causalrm_ray.data.parquet import read_batches_of
from causalrm_ray.data.snapshots.segments import (
    LABEL_SCHEMA,
    SEGMENT_SCHEMA,
    SEGMENTS,
    SegmentHeader,
    SnapshotHeader,
    drop_unused,
    read_labels,
    segment_headers,
    snapshot_header,
    write_labels,
    write_segment,
)
from causalrm_ray.errors import InputError

MOST_ROWS = 2**18  # of a segment: what is lost when a seal is interrupted, or made again when one of its rows is forgotten
FULL_ROWS = 2**14  # a last segment of fewer is sealed again with what is new
ROWS_PER_PAGE = 10_000
Result = TypeVar("Result")


class Sealer:
    """Seals the log behind `engine` in the folder of a run, for one process at a time."""

    def __init__(self, engine: Engine, tables: LogTables, rule: LabelRule, folder: Path) -> None:
        self._engine, self._tables, self._rule = engine, tables, rule
        self._folder = folder

    def seal(self, name: str, as_of: float | None) -> Path:
        """Write the snapshot snapshots/NAME.parquet of all rows of the log, and the segments that it lacks; returns its path.

        Raises InputError for a damaged log.
        """
        path = self._folder / "snapshots" / f"{name}.parquet"
        position, forgotten = self._read(self._state)
        segments = self._read(lambda connection: self._usable(connection, forgotten))
        earlier = self._read(lambda connection: self._earlier(connection, {segment.name for segment in segments}, forgotten))
        if self._engine.dialect.name == "sqlite":
            shown = self._engine.url.render_as_string(hide_password=True)
            verified = max((header.position for header in earlier.values()), default=0)
            self._read(lambda connection: verify(connection, shown, verified))
        self._extend(segments, position, forgotten)
        labels = self._labels(Known(position, as_of), earlier)
        if self._read(self._state)[1] != forgotten:  # something was, meanwhile
            return self.seal(name, as_of)
        names = tuple(segment.name for segment in segments)
        newest = self._read(lambda connection: self._newest(connection, position))
        write_labels(labels, SnapshotHeader(names, position, newest, forgotten, as_of, self._rule.digest), path)
        drop_unused(self._folder)
        return path

    def _read(self, work: Callable[[Connection], Result]) -> Result:
        return transact(self._engine, work)

    def _state(self, connection: Connection) -> tuple[int, int]:
        state = self._tables.state.c
        position, forgotten = connection.execute(select(state.position, state.forgotten)).one()
        return position, forgotten

    def _newest(self, connection: Connection, position: int) -> tuple[str | None, ...]:
        """The digests of the newest impression and the newest event up to a position."""
        tables = (self._tables.impressions, self._tables.events)
        queries = [select(one.c.digest).where(one.c.seq <= position).order_by(one.c.seq.desc()).limit(1) for one in tables]
        return tuple(connection.execute(query).scalar() for query in queries)

    def _usable(self, connection: Connection, forgotten: int) -> list[SegmentHeader]:
        """The segments that hold the first rows of this log, as they are; others are deleted, and what else there is of rows that
        were forgotten."""
        shown, longest, others = self._tables.impressions.c, {}, []
        for path, header in segment_headers(self._folder / SEGMENTS).items():  # of one beginning the longest comes last
            if header is None:
                path.unlink()
                continue
            digest = connection.execute(select(shown.digest).where(shown.seq == header.upto)).scalar()
            if (header.forgotten, header.digest) == (forgotten, digest):
                longest[header.after] = header
            else:
                others.append((path, header))
        for path, header in others:
            if header.forgotten != forgotten:
                self._erase_forgotten(connection, path)
            path.unlink(missing_ok=True)
        chain = []
        while (after := chain[-1].upto if chain else 0) in longest:
            chain.append(longest[after])
        return chain

    def _erase_forgotten(self, connection: Connection, segment: Path) -> None:
        """Erase from the run's folder what the log has forgotten of a segment's rows: rollouts know the prompts only, and this
        segment is the last to know whose they are."""
        ids, prompts = set[str](), set[str]()
        with suppress(InputError):  # a page cannot be read any more
            for batch in read_batches_of(segment, ("impression_id", "prompt"), ROWS_PER_PAGE):
                rows = dict(zip(batch["impression_id"].to_pylist(), batch["prompt"].to_pylist(), strict=True))
                gone = forgotten_of(connection, self._tables, rows)
                ids |= gone
                prompts |= {rows[name] for name in gone}
        if ids:
            erase_copies(self._folder, Forgotten(frozenset(ids), frozenset(prompts), None), running=True)

    def _earlier(self, connection: Connection, segments: set[str], forgotten: int) -> dict[Path, SnapshotHeader]:
        """The snapshots that were made of these segments, and of this log as it is up to their positions."""
        found = {}
        for path in (self._folder / "snapshots").glob("*.parquet"):
            with suppress(InputError):  # one that cannot be read is none
                header = snapshot_header(path)
                if header is None or not segments.issuperset(header.segments):
                    continue
                if (header.forgotten, header.newest) == (forgotten, self._newest(connection, header.position)):
                    found[path] = header
        return found

    def _extend(self, segments: list[SegmentHeader], position: int, forgotten: int) -> None:
        """Seal the impressions up to a position that no segment holds."""
        there = set(segments)
        if segments and segments[-1].rows < FULL_ROWS:
            segments.pop()
        while True:
            after = segments[-1].upto if segments else 0
            header = self._read(lambda connection, after=after: self._header(connection, after, position, forgotten))
            if header is None:
                return
            if header not in there:
                self._read(lambda connection, header=header: self._write(connection, header))
            segments.append(header)

    def _header(self, connection: Connection, after: int, position: int, forgotten: int) -> SegmentHeader | None:
        """The header of the next segment; None where there are no more rows."""
        shown = self._tables.impressions.c
        seqs = select(shown.seq).where(shown.seq > after, shown.seq <= position).order_by(shown.seq).limit(MOST_ROWS)
        found = connection.execute(seqs).scalars().all()
        if not found:
            return None
        digest = connection.execute(select(shown.digest).where(shown.seq == found[-1])).scalar()
        if digest is None:  # forgotten meanwhile
            return self._header(connection, after, position, forgotten)
        return SegmentHeader(after, found[-1], len(found), digest, forgotten)

    def _write(self, connection: Connection, header: SegmentHeader) -> None:
        shown = self._tables.impressions.c
        columns = [shown["id" if name == "impression_id" else name] for name in SEGMENT_SCHEMA.names]
        query = select(*columns).where(shown.seq > header.after, shown.seq <= header.upto).order_by(shown.seq)
        write_segment(pages(connection, query, SEGMENT_SCHEMA), header, self._folder / SEGMENTS)

    def _labels(self, known: Known, earlier: dict[Path, SnapshotHeader]) -> pa.Table:
        """Position, label and signal of all impressions with feedback, by position; from a snapshot before where one is alike."""
        alike = [
            (header.position, path)
            for path, header in earlier.items()
            if known.as_of is None and header.as_of is None and header.rule == self._rule.digest
        ]
        if not alike:
            return self._read(lambda connection: _table(connection, label_query(self._tables, self._rule, known))).sort_by("seq")
        after, path = max(alike)
        query = new_label_query(self._tables, self._rule, known, after)
        changed = self._read(lambda connection: _table(connection, query))
        before = read_labels(path)
        stays = ~np.isin(before["seq"].to_numpy(), changed["seq"].to_numpy())
        kept = [before.filter(pa.array(stays)), changed.filter(changed["label"].is_valid())]
        return pa.concat_tables(kept).unify_dictionaries().sort_by("seq")


def pages(connection: Connection, query: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of a SELECT under a schema whose columns are in its order; a page of them is in memory."""
    for page in connection.execution_options(yield_per=ROWS_PER_PAGE).execute(query).partitions():
        columns = zip(zip(*page, strict=True), schema, strict=True)
        yield pa.RecordBatch.from_arrays([pa.array(column, field.type) for column, field in columns], schema=schema)


def _table(connection: Connection, query: Any) -> pa.Table:
    plain = pa.schema([(field.name, pa.string() if field.name == "signal" else field.type) for field in LABEL_SCHEMA])
    return pa.Table.from_batches(pages(connection, query, plain), plain).cast(LABEL_SCHEMA)
