"""The durable feedback log: append what was shown and what users did about it, read back what was known at a moment.

    writers --append--> impressions, events (append-only, one transaction a batch) --snapshot--> one row per impression
                                                                                   --stream----> new events in order

Any database that SQLAlchemy speaks to will do; open a new one once before several processes share it (SQLite needs no such
care). SQLite runs in WAL mode with synchronous=NORMAL: a killed process loses nothing that was committed; a power cut may lose
the last commits, but never tears one. It keeps no checksums: each snapshot first compares every row with its digest. Other
databases are left to check their own pages.
"""

from __future__ import annotations

import math
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from sqlalchemy import (
    DDL,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    and_,
    create_engine,
    exists,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy import event as hooks
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from causalrm_ray.data.log.schema import (
    RETRACT,
    check_signals,
    event_row,
    event_table,
    impression_row,
    impression_table,
    metadata,
    row_digest,
    state_table,
)
from causalrm_ray.data.log.snapshot import SNAPSHOT_SCHEMA
from causalrm_ray.errors import InputError
from causalrm_ray.types import FeedbackEvent, Impression

_IDS_PER_QUERY = 500
_ROWS_PER_PAGE = 10_000
_BUSY_TIMEOUT_S = 60.0


class ConflictError(InputError):
    """An id that is delivered again with other content: names both contents."""


@dataclass(frozen=True, slots=True)
class Written:
    """How many records of a batch were new; the rest were in the log already."""

    impressions: int
    events: int


@dataclass(frozen=True, slots=True)
class LogCounts:
    """What a log holds. `events` counts all events, retractions and orphans included.

    `orphans`: events whose impression has not arrived; `retractions`: events that withdraw another, `dangling_retractions` of
    them one that has not arrived for that impression; `unmapped`: events of a signal that this log gives no label;
    `redelivered`: repeated deliveries that were ignored since the log was made.
    """

    impressions: int
    events: int
    orphans: int
    retractions: int
    dangling_retractions: int
    unmapped: int
    redelivered: int


class FeedbackLog:
    """An append-only log behind an SQLAlchemy URL, e.g. "sqlite:////data/feedback.db"; several processes may write at once.

    `signals` maps each signal to its label (1 liked, 0 disliked). The log stores the signal; the label is looked up when a
    snapshot is taken, so that another mapping may be laid over the same log.
    """

    def __init__(self, url: str, signals: Mapping[str, int]) -> None:
        self.signals = check_signals(signals)
        self._engine = _open(url)
        self._shown = self._engine.url.render_as_string(hide_password=True)

    @contextmanager
    def _connected(self, write: bool = False) -> Iterator[Connection]:
        """A connection for one transaction. Raises InputError where the database fails: it is gone, locked or damaged."""
        try:
            with self._engine.begin() if write else self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            reason = error.orig if isinstance(error, DBAPIError) else error  # without the statement's rows: they are people's
            raise InputError(f"feedback.url: the log {self._shown} cannot be used: {reason}") from error

    def append_impressions(self, batch: Sequence[Impression]) -> int:
        """Log impressions and return how many were new; see `append`."""
        return self.append(impressions=batch).impressions

    def append_events(self, batch: Sequence[FeedbackEvent]) -> int:
        """Log events and return how many were new; see `append`."""
        return self.append(events=batch).events

    def append(self, impressions: Sequence[Impression] = (), events: Sequence[FeedbackEvent] = ()) -> Written:
        """Log a batch in one transaction: all of it is durable on return, or none of it if this raises or the process dies.

        A record whose id is logged already with equal content is ignored and counted as redelivered. Events may come before
        their impression. Raises RecordError for a record that breaks a rule, ConflictError for an id with other content.
        """
        rows = [impression_row(record) for record in impressions], [event_row(record, self.signals) for record in events]
        with self._connected(write=True) as connection:
            # Taking the row's lock first makes writers queue up on every database, so that positions follow commits.
            connection.execute(update(state_table).values(position=state_table.c.position))
            position = connection.execute(select(state_table.c.position)).scalar_one()
            shown = _insert_new(connection, impression_table, rows[0], position)
            done = _insert_new(connection, event_table, rows[1], position + shown)
            redelivered = len(rows[0]) + len(rows[1]) - shown - done
            connection.execute(
                update(state_table).values(position=position + shown + done, redelivered=state_table.c.redelivered + redelivered)
            )
        return Written(impressions=shown, events=done)

    def counts(self) -> LogCounts:
        """What the log holds now."""
        other = event_table.alias()
        shown = exists().where(impression_table.c.id == event_table.c.impression_id)
        target = exists().where(other.c.id == event_table.c.retracts, other.c.impression_id == event_table.c.impression_id)
        retraction = event_table.c.signal == RETRACT
        known = event_table.c.signal.in_([*self.signals, RETRACT])
        columns = [
            _count(impression_table),
            _count(event_table),
            _count(event_table, ~shown),
            _count(event_table, retraction),
            _count(event_table, retraction, ~target),
            _count(event_table, ~known),
            select(state_table.c.redelivered).scalar_subquery(),
        ]
        with self._connected() as connection:
            return LogCounts(*connection.execute(select(*columns)).one())

    def position(self) -> int:
        """The `seq` of the newest row; 0 for an empty log."""
        with self._connected() as connection:
            return connection.execute(select(state_table.c.position)).scalar_one()

    def snapshot(self, as_of: float | None = None, upto: int | None = None) -> Dataset:
        """What was known at time `as_of` (seconds; none: no limit), from the rows up to position `upto` (none: all).

        One row per impression with time <= as_of, ordered by (time, id), under SNAPSHOT_SCHEMA. Its label is that of the last
        event, by (time, event id), among those of a mapped signal with time <= as_of which no retraction with time <= as_of
        withdraws; without one it is unobserved. A retraction counts only for its own impression and is final. Late events
        change the snapshot of a past `as_of`; the one of a given `upto` never changes. Raises InputError for a damaged log.
        """
        if as_of is not None and math.isnan(as_of):
            raise ValueError(f"as_of must be a time in seconds, got {as_of}")
        with self._connected() as connection:
            newest = connection.execute(select(state_table.c.position)).scalar_one()
            if connection.dialect.name == "sqlite":
                _verify(connection, newest, self._shown)
            if upto is not None and not 0 <= upto <= newest:
                raise ValueError(f"upto must be a position in [0, {newest}], got {upto}")
            query = _snapshot_query(self.signals, as_of, newest if upto is None else upto)
            result = connection.execution_options(yield_per=_ROWS_PER_PAGE).execute(query)
            batches = [_snapshot_batch(page, self.signals) for page in result.partitions()]
        return Dataset(pa.Table.from_batches(batches, SNAPSHOT_SCHEMA))

    def stream(self, after: int = 0, limit: int | None = None) -> Iterator[tuple[int, FeedbackEvent]]:
        """Events logged after position `after` as (seq, event), in order of `seq`, at most `limit` of them (none: all)."""
        seq, columns = event_table.c.seq, [event_table.c[field.name] for field in fields(FeedbackEvent)]
        left = math.inf if limit is None else limit
        while left > 0:
            size = int(min(left, _ROWS_PER_PAGE))
            query = select(seq, *columns).where(seq > after).order_by(seq).limit(size)
            with self._connected() as connection:
                page = connection.execute(query).all()
            for position, *values in page:
                after = position
                yield position, FeedbackEvent(*values)
            left = left - size if len(page) == size else 0

    def close(self) -> None:
        """Let go of the database's connections."""
        self._engine.dispose()


def _open(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database.startswith((":memory:", "file:")):
                raise InputError(f"feedback.url must name a file by its path, so that the log is kept; got {url!r}")
            _make_file(parsed, Path(parsed.database))
        engine = _engine(parsed)
        _create_tables(engine)
    except (SQLAlchemyError, ImportError, OSError) as error:  # no such dialect, no driver, no server, no right to write
        shown = make_url(url).render_as_string(hide_password=True) if "://" in url else url
        raise InputError(f"feedback.url must open a database, got {shown!r}: {error}") from error
    return engine


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url)
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})

    @hooks.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would otherwise begin and commit by guesses of its own
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.create_function("row_digest", -1, row_digest, deterministic=True)

    @hooks.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _make_file(url: URL, path: Path) -> None:
    """Make an SQLite log in WAL mode unless there is a file.

    It is made aside and linked into place whole: processes that set up one new file at once would find it locked, or half made.
    """
    if path.exists():
        if path.stat().st_size == 0:  # SQLite would begin a new log in it, as if there had been none
            raise InputError(f"feedback.url: the log {path} is empty, as no log ever is: remove it, or bring its copy")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        with closing(sqlite3.connect(aside)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # stays with the file
        engine = _engine(url.set(database=str(aside)))
        _create_tables(engine)
        engine.dispose()
        with suppress(FileExistsError):
            os.link(aside, path)


def _create_tables(engine: Engine) -> None:
    with engine.begin() as connection:
        metadata.create_all(connection)
        for table in (impression_table, event_table):
            if "digest" not in {column["name"] for column in inspect(connection).get_columns(table.name)}:
                connection.execute(DDL(f"ALTER TABLE {table.name} ADD COLUMN digest VARCHAR(16)"))
        if connection.execute(select(state_table.c.id)).first() is None:
            connection.execute(insert(state_table).values(id=1, position=0, redelivered=0))


def _verify(connection: Connection, position: int, shown: str) -> None:
    """Raise InputError unless an SQLite log is whole: its pages and indexes, the number of its rows, and each row's digest."""
    fault = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
    if fault != "ok":
        raise InputError(f"feedback.url: the log {shown} is damaged: {fault}")
    tables = (impression_table, event_table)
    rows = sum(connection.execute(select(_count(table))).scalar_one() for table in tables)
    if rows != position:
        raise InputError(f"feedback.url: the log {shown} is damaged: it must hold {position} rows, got {rows}")
    for table in tables:
        altered = select(table.c.id).where(table.c.digest != func.row_digest(*_digested(table))).limit(1)
        if (row := connection.execute(altered).first()) is not None:
            raise InputError(f"feedback.url: the log {shown} is damaged: {table.name} {row.id!r} is not as it was written")


def _digested(table: Table) -> list[Any]:
    return [column for column in table.c if column.name != "digest"]


def _insert_new(connection: Connection, table: Table, rows: Sequence[dict[str, Any]], position: int) -> int:
    """Insert the rows that are not logged yet, from position + 1 on, and return their number."""
    known = _known_rows(connection, table, [row["id"] for row in rows])
    fresh = []
    for row in rows:
        before = known.setdefault(row["id"], row)
        if before is row:
            whole = {**row, "seq": position + 1 + len(fresh)}
            fresh.append({**whole, "digest": row_digest(*(whole[column.name] for column in _digested(table)))})
        elif before != row:
            raise _conflict(table, before, row)
    if fresh:
        connection.execute(insert(table), fresh)
    return len(fresh)


def _known_rows(connection: Connection, table: Table, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    names = [column.name for column in table.c if column.name not in ("seq", "digest")]
    known: dict[str, dict[str, Any]] = {}
    for start in range(0, len(ids), _IDS_PER_QUERY):
        query = select(*(table.c[name] for name in names)).where(table.c.id.in_(ids[start : start + _IDS_PER_QUERY]))
        for row in connection.execute(query):
            known[row.id] = dict(zip(names, row, strict=True))
    return known


def _conflict(table: Table, before: Mapping[str, Any], after: Mapping[str, Any]) -> ConflictError:
    parts = [f"{name}={before[name]!r:.80} then {after[name]!r:.80}" for name in after if before[name] != after[name]]
    return ConflictError(f"{table.name}: id {after['id']!r} must keep its content, got {', '.join(parts)}")


def _count(table: Table, *conditions: ColumnElement[bool]) -> Any:
    return select(func.count()).select_from(table).where(*conditions).scalar_subquery()


def _snapshot_query(signals: Mapping[str, int], as_of: float | None, upto: int) -> Select:
    def known(table: Any) -> ColumnElement[bool]:
        recorded = table.c.seq <= upto
        return recorded if as_of is None else and_(recorded, table.c.time <= as_of)

    withdrawal = event_table.alias("withdrawal")
    withdrawn = exists().where(
        withdrawal.c.retracts == event_table.c.id, withdrawal.c.impression_id == event_table.c.impression_id, known(withdrawal)
    )
    newest_first = (event_table.c.time.desc(), event_table.c.id.desc())
    rank = func.row_number().over(partition_by=event_table.c.impression_id, order_by=newest_first)
    ranked = (
        select(event_table.c.impression_id, event_table.c.signal, rank.label("rank"))
        .where(event_table.c.signal.in_(sorted(signals)), known(event_table), ~withdrawn)
        .subquery()
    )
    shown = impression_table
    return (
        select(
            shown.c.id,
            shown.c.prompt,
            shown.c.response,
            ranked.c.signal,
            shown.c.policy_version,
            shown.c.time,
            shown.c.user,
            shown.c.context,
        )
        .select_from(shown.outerjoin(ranked, and_(ranked.c.impression_id == shown.c.id, ranked.c.rank == 1)))
        .where(known(shown))
        .order_by(shown.c.time, shown.c.id)
    )


def _snapshot_batch(page: Sequence[Any], signals: Mapping[str, int]) -> pa.RecordBatch:
    ids, prompts, responses, given, versions, times, users, contexts = zip(*page, strict=True)
    signal = pa.array(given, pa.string())
    observed = signal.is_valid().cast(pa.int8())
    label = [signals.get(name) for name in given]
    columns = [ids, prompts, responses, observed, label, signal, versions, times, users, contexts]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SNAPSHOT_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SNAPSHOT_SCHEMA)
