"""The feedback log's database: opened, its tables made or brought up to date, waited for where it goes away, and verified.

Any database that SQLAlchemy supports will do. Several processes may open a new one at once on SQLite and PostgreSQL; elsewhere
open it once before. PostgreSQL is reached through psycopg 3 (`pip install 'causalrm-ray[postgres]'`).
SQLite runs in WAL mode with synchronous=NORMAL: a killed process loses nothing that was committed; a power cut may lose the last
commits, but never part of one. A file that others made keeps its own mode. SQLite keeps no checksums, so `verify` compares every
row with its digest. Other databases check their own pages.
A server that goes away after the log was opened (restarted, failed over) is waited for, up to RECONNECT_S for each transaction,
which is then repeated from its start.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from causalrm_ray.data.log.migrations import is_current, needs_upgrade, upgrade
from causalrm_ray.data.log.tables import LogTables, digested_columns, log_tables, row_digest
from causalrm_ray.errors import InputError, brief

Result = TypeVar("Result")
RECONNECT_S = 60.0
_BUSY_TIMEOUT_S = 60.0
_LONGEST_PAUSE_S = 2.0
_TRANSIENT = ("57P01", "57P02", "57P03", "40001", "40P01")  # PostgreSQL: shutting down, starting up, a deadlock
_UPGRADE_LOCK = zlib.crc32(b"causalrm_ray tables")  # of PostgreSQL, by number


def open_database(url: str) -> Engine:
    """The engine behind an SQLAlchemy URL, its tables there. Raises InputError that names the URL without its password."""
    try:
        parsed = _with_driver(make_url(url))
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database.startswith((":memory:", "file:")):
                raise InputError(f"feedback.url must name a file by its path, so that the log is kept; got {url!r}")
            _create_file(parsed, Path(parsed.database))
        engine = _engine(parsed)
        _upgrade_tables(engine)
    except (SQLAlchemyError, ImportError, OSError) as error:  # no such dialect, no driver, no server, no right to write
        shown = make_url(url).render_as_string(hide_password=True) if "://" in url else url
        raise InputError(f"feedback.url must open a database, got {shown!r}: {error}") from error
    return engine


def transact(engine: Engine, work: Callable[[Connection], Result]) -> Result:
    """What `work` returns, in a transaction that is repeated while the server is away.

    A server may go away between a commit and its answer: `work` must do no harm when it is done twice. Raises InputError where
    the database cannot be used: it is away for RECONNECT_S, locked or damaged.
    """
    deadline, pause = time.monotonic() + RECONNECT_S, 0.1
    while True:
        try:
            with engine.begin() as connection:
                return work(connection)
        except (SQLAlchemyError, engine.dialect.loaded_dbapi.Error) as error:  # the latter: of what the driver did by itself
            if not _is_away(engine, error) or time.monotonic() > deadline:
                reason = str(error.orig if isinstance(error, DBAPIError) else error)
                shown = engine.url.render_as_string(hide_password=True)
                # The first line only: further ones may quote rows, which are people's.
                raise InputError(f"feedback.url: the log {shown} cannot be used: {reason.partition(chr(10))[0]}") from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _is_away(engine: Engine, error: Exception) -> bool:
    """Whether the server may be back soon: it closed the connection, or takes none."""
    if engine.dialect.name == "sqlite":  # it waits for locks by itself
        return False
    cause = error.orig if isinstance(error, DBAPIError) else error
    refused = isinstance(error, OperationalError) and error.statement is None
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    state = getattr(cause, "sqlstate", None)
    copying = (
        not isinstance(error, SQLAlchemyError) and isinstance(cause, engine.dialect.loaded_dbapi.OperationalError) and not state
    )
    return refused or lost or copying or state in _TRANSIENT


def sweep(engine: Engine, tables: LogTables) -> None:
    """Leave nothing of deleted rows in the database's files: SQLite's journal is emptied, PostgreSQL's dead rows are removed."""
    if engine.dialect.name == "sqlite":
        with engine.connect().execution_options(begin="SELECT 1") as connection:  # a checkpoint needs no transaction around it
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    elif engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in (tables.impressions, tables.events):
                connection.exec_driver_sql(f"VACUUM {connection.dialect.identifier_preparer.format_table(table)}")


def verify(connection: Connection, shown: str, after: int = 0) -> None:
    """Raise InputError unless an SQLite log is whole: its pages and indexes, the number of its rows, and each row's digest.

    Where its rows up to position `after` were verified before, only digests of later ones, and the number, are.
    """
    tables = log_tables("sqlite")
    if not after:
        _check_pages(connection, shown)
    position, forgotten = connection.execute(select(tables.state.c.position, tables.state.c.forgotten)).one()
    both = (tables.impressions, tables.events)
    rows = sum(connection.execute(select(func.count()).select_from(table)).scalar_one() for table in both)
    if rows != position - forgotten:
        raise InputError(f"feedback.url: the log {shown} is damaged: it must hold {position - forgotten} rows, got {rows}")
    for table in both:
        digest = func.row_digest(*digested_columns(table))
        altered = select(table.c.id).where(table.c.seq > after, table.c.digest != digest).limit(1)
        if (row := connection.execute(altered).first()) is not None:
            raise InputError(f"feedback.url: the log {shown} is damaged: {table.name} {brief(row.id)} is not as it was written")


def _check_pages(connection: Connection, shown: str) -> None:
    fault = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
    if fault != "ok":
        raise InputError(f"feedback.url: the log {shown} is damaged: {fault}")


def _with_driver(url: URL) -> URL:
    """A URL of PostgreSQL that names no driver gets psycopg 3; `postgres` is how many services write it."""
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return create_engine(url, hide_parameters=True, pool_pre_ping=True)
        except ImportError as error:
            if url.drivername == "postgresql+psycopg":
                raise ImportError(f"{error}; install it with: pip install 'causalrm-ray[postgres]'") from error
            raise
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would otherwise begin and commit where it sees fit
        if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
            connection.execute("PRAGMA synchronous=NORMAL")  # safe in this mode only
        connection.execute("PRAGMA secure_delete=ON")  # what is forgotten leaves no trace in free pages
        connection.create_function("row_digest", -1, row_digest, deterministic=True)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _create_file(url: URL, path: Path) -> None:
    """Create an SQLite log in WAL mode unless there is a file.

    It is created under a temporary name and then linked to its own: processes that open one new file at once would otherwise find
    it locked or half created.
    """
    if path.exists():
        if path.stat().st_size == 0:  # SQLite would begin a new log in it, as if there had been none
            raise InputError(f"feedback.url: the log {path} is empty, as no log ever is: remove it, or bring its copy")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with closing(sqlite3.connect(temporary)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # stays with the file
        engine = _engine(url.set(database=str(temporary)))
        _upgrade_tables(engine)
        engine.dispose()
        with suppress(FileExistsError):
            os.link(temporary, path)


def _upgrade_tables(engine: Engine) -> None:
    """Make the tables, or bring them up to date, in one transaction that no other process shares."""
    shown = engine.url.render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            if is_current(connection):
                return
        with engine.connect().execution_options(begin="BEGIN IMMEDIATE") as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
            if needs_upgrade(connection):  # no other process did it meanwhile
                if engine.dialect.name == "sqlite":
                    _check_pages(connection, shown)
                upgrade(connection)
    except InputError as error:
        raise InputError(f"feedback.url: the log {shown} cannot be used: {error}") from error
