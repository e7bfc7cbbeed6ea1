"""Rows of a query on a database that is only read."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from causalrm_ray.data.readers.files import no_such_file
from causalrm_ray.data.readers.part import Part
from causalrm_ray.data.rows import RawRow, SourceError

DATABASES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql", "duckdb")  # how URLs of databases begin
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
READS = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:select|with|values|table)\b", re.IGNORECASE | re.DOTALL)
_ROWS_PER_FETCH = 1_000
_READ_ONLY = {  # dialect -> what makes all later transactions of a connection read only
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}


def is_database(source: str) -> bool:
    """Whether a source is the SQLAlchemy URL of a database."""
    return "://" in source and source.split("://", 1)[0].split("+")[0] in DATABASES


class SqlPart(Part):
    """The rows of one query. Nothing is ever written: the connection is read only, and the query must begin with SELECT or WITH.

    `option` is what gave the query, for error messages; the URL's password is never shown.
    """

    def __init__(self, url: str, query: str, option: str) -> None:
        try:
            self._url = make_url(url)
        except ArgumentError as error:
            raise SourceError("feedback.source must be the SQLAlchemy URL of a database, dialect://user@host/name") from error
        super().__init__(f"{self._url.render_as_string(hide_password=True)} ({option})")
        self._query = query.strip().rstrip(";")
        if not READS.match(self._query) or ";" in QUOTED.sub("", self._query):
            raise SourceError(f"{option} must be one SELECT, which may begin with WITH, got another statement, or several")
        self._engine = _read_only(self._url)

    def rows(self) -> Iterator[RawRow]:
        statement = text(self._query.replace(":", r"\:"))  # a colon is no parameter here
        number = 0
        try:
            with self._engine.connect() as connection:
                streamed = connection.execution_options(stream_results=True, yield_per=_ROWS_PER_FETCH)
                for row in streamed.execute(statement).mappings():
                    number += 1
                    yield RawRow(self.where, number, None, {str(name): _plain(value) for name, value in row.items()})
        except SQLAlchemyError as error:
            raise SourceError(
                f"{self.where} must give rows, but after {number} of them the database says: {_reason(error)}"
            ) from error


def _read_only(url: URL) -> Engine:
    dialect = url.get_backend_name()
    try:
        if dialect == "sqlite":
            path = Path(url.database or "")
            if not path.is_file():
                raise SourceError(no_such_file(path) if url.database else "feedback.source must name a file: sqlite:///log.db")
            address = f"file:{quote(str(path.resolve()))}?mode=ro"
            engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=NullPool)
        else:
            engine = create_engine(url, poolclass=NullPool)
    except (NoSuchModuleError, ImportError) as error:
        extra = ": pip install 'causalrm-ray[postgres]'" if dialect == "postgresql" else ""
        raise SourceError(f"feedback.source: a package for {url.drivername}:// is missing ({error}){extra}") from error

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        if dialect in _READ_ONLY:
            cursor = connection.cursor()
            cursor.execute(_READ_ONLY[dialect])
            cursor.close()
            connection.commit()

    return engine


def _reason(error: SQLAlchemyError) -> str:
    """The first line of what the database says; of faults in data only their kind, for they quote it."""
    if not isinstance(error, DBAPIError):
        return type(error).__name__
    if isinstance(error, DataError):
        return f"a value does not fit its type ({type(error.orig).__name__})"
    return str(error.orig).split("\n", 1)[0]


def _plain(value: Any) -> Any:
    """A value of a database as JSON would have it, times excepted."""
    if value is None or isinstance(value, str | int | float | datetime | dict | list):
        return value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, date | time | UUID):
        return str(value)
    return bytes(value).decode(errors="replace") if isinstance(value, bytes | memoryview) else value
