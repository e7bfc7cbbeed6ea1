"""The durable feedback log: append what was shown and what users did about it, read back what was known at a moment.

writers --append--> impressions, events (append-only, one transaction a batch) --snapshot--> one row per impression
                                                                               --stream----> new events in order
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from sqlalchemy import ColumnElement, Connection, Table, exists, func, select, update

from causalrm_ray.config.train import Config
from causalrm_ray.data.log.bulk import forgotten_of, insert_new, remove
from causalrm_ray.data.log.database import open_database, sweep, transact, verify
from causalrm_ray.data.log.schema import RETRACT, check_signals, event_row, impression_row
from causalrm_ray.data.log.sealing.queries import Known, LabelRule, snapshot_query
from causalrm_ray.data.log.sealing.seal import Sealer, pages
from causalrm_ray.data.log.tables import log_tables
from causalrm_ray.data.snapshots.table import SNAPSHOT_SCHEMA, as_dataset, write_batches
from causalrm_ray.types import FeedbackEvent, Impression, Meaning

_ROWS_PER_PAGE = 10_000


@dataclass(frozen=True, slots=True)
class Written:
    """How many records of a batch were new, and how many are about impressions that were forgotten; the rest were in the log
    already."""

    impressions: int
    events: int
    forgotten_impressions: int = 0
    forgotten_events: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What the log holds of a user, or of one impression: its ids and prompts (Conversation.json)."""

    ids: tuple[str, ...]
    prompts: frozenset[str]


@dataclass(frozen=True, slots=True)
class LogCounts:
    """What a log holds. `events` counts all events, retractions and orphans included.

    `orphans`: events whose impression has not arrived; `retractions`: events that withdraw another, `dangling_retractions` of
    them one that has not arrived for that impression; `unmapped`: events of a signal that this log gives no label;
    `redelivered`: repeated deliveries that were ignored since the log was created; `forgotten`: rows that were removed for ever.
    """

    impressions: int
    events: int
    orphans: int
    retractions: int
    dangling_retractions: int
    unmapped: int
    redelivered: int
    forgotten: int


class FeedbackLog:
    """An append-only log behind an SQLAlchemy URL, e.g. "sqlite:////data/feedback.db"; several processes may write at once.

    `signals` maps each signal to its label (1 liked, 0 disliked), to thresholds on its value, or to None: `left_out`, no
    feedback. `order` ranks them (see `snapshot`). The log stores signals and values: labels are made when a snapshot is taken,
    so that the same log may be read under other rules.
    """

    def __init__(self, url: str, signals: Mapping[str, Meaning | None], order: Sequence[Sequence[str]] = ()) -> None:
        self.signals = check_signals({signal: meaning for signal, meaning in signals.items() if meaning is not None})
        self.left_out = signals.keys() - self.signals.keys()
        self._rule = LabelRule(self.signals, order)
        self._engine = open_database(url)
        self._tables = log_tables(self._engine.dialect.name)

    def append(self, impressions: Sequence[Impression] = (), events: Sequence[FeedbackEvent] = ()) -> Written:
        """Log a batch in one transaction: all of it is durable on return, or none of it if this raises or the process dies.

        A record whose id is logged already with equal content is ignored and counted as redelivered. Events may come before
        their impression. Where the server goes away the batch is written again when it is back; rows that were committed before
        its answer was lost then count as redelivered. Raises RecordError for a record that breaks a rule, ConflictError for an id
        with other content.
        """
        return self.append_rows(
            [impression_row(record) for record in impressions], [event_row(record, self.signals) for record in events]
        )

    def append_rows(
        self, impressions: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], repeated: Collection[str] = ()
    ) -> Written:
        """As `append`, for what `schema.impression_row` and `event_row` made of records.

        `repeated` are ids of impressions that may be in the log at another time, which stays. What was forgotten stays out.
        """
        state = self._tables.state

        def write(connection: Connection) -> Written:
            # Taking the row's lock first makes writers queue up on every database, so that positions follow commits.
            connection.execute(update(state).values(position=state.c.position))
            position = connection.execute(select(state.c.position)).scalar_one()
            named = {row["id"] for row in impressions} | {row["impression_id"] for row in events}
            gone = forgotten_of(connection, self._tables, named)
            kept = [row for row in impressions if row["id"] not in gone] if gone else impressions
            about = [row for row in events if row["impression_id"] not in gone] if gone else events
            shown = insert_new(connection, self._tables.impressions, kept, position, repeated)
            done = insert_new(connection, self._tables.events, about, position + shown)
            redelivered = len(kept) + len(about) - shown - done
            connection.execute(
                update(state).values(position=position + shown + done, redelivered=state.c.redelivered + redelivered)
            )
            return Written(shown, done, len(impressions) - len(kept), len(events) - len(about))

        return transact(self._engine, write)

    def find(self, user: str | None = None, impression: str | None = None) -> Found:
        """What there is of a user, or of an impression, to forget; an impression that is not there is found by its id alone."""
        shown = self._tables.impressions
        query = select(shown.c.id, shown.c.prompt).where(shown.c.user == user if impression is None else shown.c.id == impression)
        rows = transact(self._engine, lambda connection: connection.execute(query.order_by(shown.c.id)).all())
        ids = [row.id for row in rows] or ([] if impression is None else [impression])
        return Found(tuple(ids), frozenset(row.prompt for row in rows))

    def forget(self, ids: Sequence[str], time: float) -> tuple[int, int]:
        """Remove impressions and all events about them for ever; returns the numbers of both that there were.

        A hash of each id is kept with `time`, so that neither comes in again. Positions of other rows stay what they are.
        """
        state = self._tables.state

        def write(connection: Connection) -> tuple[int, int]:
            connection.execute(update(state).values(position=state.c.position))
            impressions, events = remove(connection, self._tables, ids, time)
            connection.execute(update(state).values(forgotten=state.c.forgotten + impressions + events))
            return impressions, events

        removed = transact(self._engine, write)
        sweep(self._engine, self._tables)
        return removed

    def counts(self) -> LogCounts:
        """What the log holds now."""
        impressions, events, state = self._tables.impressions, self._tables.events, self._tables.state
        other = events.alias()
        shown = exists().where(impressions.c.id == events.c.impression_id)
        target = exists().where(other.c.id == events.c.retracts, other.c.impression_id == events.c.impression_id)
        retraction = events.c.signal == RETRACT
        known = events.c.signal.in_([*self.signals, RETRACT])
        columns = {
            "impressions": _count(impressions),
            "events": _count(events),
            "orphans": _count(events, ~shown),
            "retractions": _count(events, retraction),
            "dangling_retractions": _count(events, retraction, ~target),
            "unmapped": _count(events, ~known),
            "redelivered": select(state.c.redelivered).scalar_subquery(),
            "forgotten": select(state.c.forgotten).scalar_subquery(),
        }
        asked = select(*(column.label(name) for name, column in columns.items()))
        found = transact(self._engine, lambda connection: connection.execute(asked).mappings().one())
        return LogCounts(**{name: int(found[name]) for name in columns})

    def count_others(self, prefix: str) -> int:
        """How many impressions have an id that does not begin with `prefix`."""
        shown = self._tables.impressions
        query = select(func.count()).where(~shown.c.id.startswith(prefix, autoescape=True))
        return transact(self._engine, lambda connection: connection.execute(query).scalar_one())

    def position(self) -> int:
        """The `seq` of the newest row; 0 for an empty log."""
        query = select(self._tables.state.c.position)
        return transact(self._engine, lambda connection: connection.execute(query).scalar_one())

    def snapshot(self, as_of: float | None = None, upto: int | None = None) -> Dataset:
        """What was known at time `as_of` (seconds; None: no limit), from the rows up to position `upto` (None: all).

        One row per impression with time <= as_of, ordered by (time, id), under SNAPSHOT_SCHEMA. Its label is made of the events
        that count: those with time <= as_of whose signal, at its value, means a label, and which no retraction with time <=
        as_of withdraws. Of the signals of the highest rank among them (the first of `order`; others come last, together) it is
        that of the newest event, by (time, event id). Without an event that counts an impression is unobserved. A retraction
        counts only for its own impression and is final. Late events change the snapshot of a past `as_of`; the one of a given
        `upto` never changes, but for what is forgotten. Raises InputError for a damaged log.
        """
        return as_dataset(transact(self._engine, lambda connection: list(self._batches(connection, as_of, upto))))

    def export(self, path: Path) -> None:
        """Write the snapshot of all rows as one Parquet file, whole or not at all; a page of rows is in memory."""
        transact(self._engine, lambda connection: write_batches(self._batches(connection, None, None), path))

    def seal(self, folder: Path, name: str, as_of: float | None = None) -> Path:
        """Write the snapshot as of a time (None: no limit) to `folder`/snapshots/`name`.parquet, and return its path.

        Its texts are in `folder`/segments, which hold what earlier snapshots did: only new rows are read.
        Rows are in the order of their positions. One process at a time may do this in a folder. Raises as `snapshot` does.
        """
        _check_time(as_of)
        return Sealer(self._engine, self._tables, self._rule, folder).seal(name, as_of)

    def stream(self, after: int = 0, limit: int | None = None) -> Iterator[tuple[int, FeedbackEvent]]:
        """Events logged after position `after` as (seq, event), in order of `seq`, at most `limit` of them (None: all)."""
        events = self._tables.events
        seq, columns = events.c.seq, [events.c[field.name] for field in fields(FeedbackEvent)]
        left = math.inf if limit is None else limit
        while left > 0:
            size = int(min(left, _ROWS_PER_PAGE))
            query = select(seq, *columns).where(seq > after).order_by(seq).limit(size)
            page = transact(self._engine, lambda connection, query=query: connection.execute(query).all())
            for position, *values in page:
                after = position
                yield position, FeedbackEvent(*values)
            left = left - size if len(page) == size else 0

    def _batches(self, connection: Connection, as_of: float | None, upto: int | None) -> Iterator[pa.RecordBatch]:
        _check_time(as_of)
        newest = connection.execute(select(self._tables.state.c.position)).scalar_one()
        if connection.dialect.name == "sqlite":
            verify(connection, self._engine.url.render_as_string(hide_password=True))
        if upto is not None and not 0 <= upto <= newest:
            raise ValueError(f"upto must be a position in [0, {newest}], got {upto}")
        known = Known(newest if upto is None else upto, as_of)
        yield from pages(connection, snapshot_query(self._tables, self._rule, known), SNAPSHOT_SCHEMA)

    def close(self) -> None:
        """Let go of the database's connections."""
        self._engine.dispose()


def open_log(config: Config) -> FeedbackLog:
    """The log of a run, read under the run's rules."""
    return FeedbackLog(config.log_url, config.feedback.signals, config.feedback.order)


def _count(table: Table, *conditions: ColumnElement[bool]) -> Any:
    return select(func.count()).select_from(table).where(*conditions).scalar_subquery()


def _check_time(as_of: float | None) -> None:
    if as_of is not None and math.isnan(as_of):
        raise ValueError(f"as_of must be a time in seconds, got {as_of}")
