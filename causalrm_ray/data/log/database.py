"""The feedback log's database: opened, created where there is none, and verified.

Any database that SQLAlchemy supports will do; open a new one once before several processes share it (SQLite needs no such care).
SQLite runs in WAL mode with synchronous=NORMAL: a killed process loses nothing that was committed; a power cut may lose the last
commits, but never part of one. It keeps no checksums, so `verify` compares every row with its digest. Other databases check their
own pages.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import DDL, Connection, Engine, create_engine, event, func, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from causalrm_ray.data.log.schema import digested_columns, event_table, impression_table, metadata, row_digest, state_table
from causalrm_ray.errors import InputError, brief

_BUSY_TIMEOUT_S = 60.0


def open_database(url: str) -> Engine:
    """The engine behind an SQLAlchemy URL, its tables created. Raises InputError that names the URL without its password."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database.startswith((":memory:", "file:")):
                raise InputError(f"feedback.url must name a file by its path, so that the log is kept; got {url!r}")
            _create_file(parsed, Path(parsed.database))
        engine = _engine(parsed)
        _create_tables(engine)
    except (SQLAlchemyError, ImportError, OSError) as error:  # no such dialect, no driver, no server, no right to write
        shown = make_url(url).render_as_string(hide_password=True) if "://" in url else url
        raise InputError(f"feedback.url must open a database, got {shown!r}: {error}") from error
    return engine


def verify(connection: Connection, position: int, shown: str) -> None:
    """Raise InputError unless an SQLite log is whole: its pages and indexes, the number of its rows, and each row's digest."""
    fault = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
    if fault != "ok":
        raise InputError(f"feedback.url: the log {shown} is damaged: {fault}")
    tables = (impression_table, event_table)
    rows = sum(connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables)
    if rows != position:
        raise InputError(f"feedback.url: the log {shown} is damaged: it must hold {position} rows, got {rows}")
    for table in tables:
        altered = select(table.c.id).where(table.c.digest != func.row_digest(*digested_columns(table))).limit(1)
        if (row := connection.execute(altered).first()) is not None:
            raise InputError(f"feedback.url: the log {shown} is damaged: {table.name} {brief(row.id)} is not as it was written")


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url)
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would otherwise begin and commit where it sees fit
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.create_function("row_digest", -1, row_digest, deterministic=True)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

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
        _create_tables(engine)
        engine.dispose()
        with suppress(FileExistsError):
            os.link(temporary, path)


def _create_tables(engine: Engine) -> None:
    with engine.begin() as connection:
        metadata.create_all(connection)
        for table in (impression_table, event_table):
            if "digest" not in {column["name"] for column in inspect(connection).get_columns(table.name)}:
                connection.execute(DDL(f"ALTER TABLE {table.name} ADD COLUMN digest VARCHAR(16)"))
        if connection.execute(select(state_table.c.id)).first() is None:
            connection.execute(insert(state_table).values(id=1, position=0, redelivered=0))
