"""The feedback log's tables: on PostgreSQL in a schema of their own, `causalrm`, elsewhere under the prefix `causalrm_`.

    impressions   one row per response shown            key: the impression's id
    events        one row per thing a user did about it key: the event's id; its impression may be missing still
    log_state     one row: the position of the newest row, how many repeated deliveries were ignored, how many rows were forgotten
    forgotten     one row per impression that was forgotten: a hash of its id, so that it stays out

`seq` is one counter over both tables, given out while the writer holds the row of `log_state`: a row with a lower `seq` was
committed no later, so that "everything up to position p" never changes again, but for what is forgotten. `digest` shows whether
a row is still the one that was written: SQLite keeps no checksums. The tables are made by `migrations`, never from here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, String, Table, Text

MAX_ID_CHARS = 255
VERSION_TABLE = "alembic_version"  # which revision of `migrations` the tables are at

# Ids are compared byte by byte on every database: a language's collation would change the order of ties.
Identifier = (
    String(MAX_ID_CHARS)
    .with_variant(String(MAX_ID_CHARS, collation="C"), "postgresql")
    .with_variant(String(MAX_ID_CHARS, collation="utf8mb4_bin"), "mysql", "mariadb")
)


@dataclass(frozen=True)
class LogTables:
    """The tables as they are called on one kind of database."""

    metadata: MetaData
    impressions: Table
    events: Table
    state: Table
    forgotten: Table


def table_schema(dialect: str) -> str | None:
    """The schema of the tables on a kind of database; None: the database's default one."""
    return "causalrm" if dialect == "postgresql" else None


def table_name(name: str, dialect: str) -> str:
    """What the table `name` is called there."""
    return name if table_schema(dialect) else f"causalrm_{name}"


def row_digest(*columns: Any) -> str:
    """A hash of the columns of a row, as they are written and as a database gives them back (-0.0 comes back as 0.0)."""
    written = repr(list(columns))
    if "-0.0" in written:  # it may also be part of a text
        written = repr([value + 0.0 if isinstance(value, float) else value for value in columns])
    return hashlib.blake2b(written.encode(), digest_size=8).hexdigest()


def digested_columns(table: Table) -> list[Column[Any]]:
    """The columns that `row_digest` hashes, in their order."""
    return [column for column in table.c if column.name != "digest"]


def id_hash(impression_id: str) -> str:
    """What is kept of an impression that was forgotten."""
    return hashlib.blake2b(impression_id.encode(), digest_size=16).hexdigest()


@cache
def log_tables(dialect: str) -> LogTables:
    """The tables on a kind of database, named as SQLAlchemy names its dialects."""
    metadata = MetaData(schema=table_schema(dialect))
    impressions = Table(
        table_name("impressions", dialect),
        metadata,
        Column("id", Identifier, primary_key=True),
        Column("seq", BigInteger, nullable=False, unique=True),
        Column("prompt", Text, nullable=False),  # Conversation.json
        Column("response", Text, nullable=False),
        Column("policy_version", BigInteger, nullable=False),
        Column("time", Double, nullable=False),
        Column("user", Text),
        Column("context", Text, nullable=False),
        Column("conversation_id", Text),
        Column("model", Text),
        Column("logprob", Double),
        Column("asked_for_feedback", Integer),
        Column("digest", String(16), nullable=False),
    )
    events = Table(
        table_name("events", dialect),
        metadata,
        Column("id", Identifier, primary_key=True),
        Column("seq", BigInteger, nullable=False, unique=True),
        Column("impression_id", Identifier, nullable=False),
        Column("signal", Identifier, nullable=False),
        Column("value", Double, nullable=False),
        Column("time", Double, nullable=False),
        Column("retracts", Identifier),
        Column("digest", String(16), nullable=False),
    )
    Index("causalrm_events_by_impression", events.c.impression_id, events.c.time, events.c.id)
    withdraws = events.c.retracts.is_not(None)
    Index("causalrm_events_by_retracts", events.c.retracts, sqlite_where=withdraws, postgresql_where=withdraws)
    state = Table(
        table_name("log_state", dialect),
        metadata,
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("position", BigInteger, nullable=False),
        Column("redelivered", BigInteger, nullable=False),
        Column("forgotten", BigInteger, nullable=False),
    )
    forgotten = Table(
        table_name("forgotten", dialect),
        metadata,
        Column("id_hash", String(32), primary_key=True),
        Column("time", Double, nullable=False),
    )
    return LogTables(metadata, impressions, events, state, forgotten)
