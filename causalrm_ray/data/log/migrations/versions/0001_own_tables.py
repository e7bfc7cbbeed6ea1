"""The log's own tables; and what the layout before them held: `impressions`, `events` and `log_state` without a prefix.

The old tables are ours only if all three are there with exactly our columns; they are checked, copied in batches, and dropped
in the same transaction. Tables of those names with other columns are somebody else's, and stay as they are.

What this revision writes must not change when later ones do, so that it imports nothing which describes the newest tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from causalrm_ray.data.log.tables import Identifier, table_name, table_schema
from causalrm_ray.errors import InputError

revision = "0001"
down_revision = None

_IMPRESSION = ("id", "seq", "prompt", "response", "policy_version", "time", "user", "context")
_CONVERSATION = ("conversation_id", "model", "logprob", "asked_for_feedback")  # came with prompts that are conversations
_EVENT = ("id", "seq", "impression_id", "signal", "value", "time", "retracts")
_STATE = ("id", "position", "redelivered")
_LAYOUTS = {"impressions": (_IMPRESSION, _IMPRESSION + _CONVERSATION), "events": (_EVENT,), "log_state": (_STATE,)}
_ROWS_PER_BATCH = 10_000


def upgrade() -> None:
    """Create the tables, and move the old layout's rows to them."""
    connection = op.get_bind()
    impressions, events, state = _create(connection.dialect.name)
    old = _old_tables(connection)
    if old:
        position, redelivered = _check(connection, old)
        plain = "conversation_id" not in old["impressions"].c
        _move(connection, old["impressions"], impressions, plain)
        _move(connection, old["events"], events, plain=False)
        for table in old.values():
            op.drop_table(table.name)
    else:
        position, redelivered = 0, 0
    op.bulk_insert(state, [{"id": 1, "position": position, "redelivered": redelivered, "forgotten": 0}])


def _create(dialect: str) -> tuple[sa.Table, sa.Table, sa.Table]:
    schema = table_schema(dialect)
    impressions = op.create_table(
        table_name("impressions", dialect),
        sa.Column("id", Identifier, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("response", sa.Text, nullable=False),
        sa.Column("policy_version", sa.BigInteger, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("user", sa.Text),
        sa.Column("context", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("logprob", sa.Double),
        sa.Column("asked_for_feedback", sa.Integer),
        sa.Column("digest", sa.String(16), nullable=False),
        schema=schema,
    )
    events = op.create_table(
        table_name("events", dialect),
        sa.Column("id", Identifier, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
        sa.Column("impression_id", Identifier, nullable=False),
        sa.Column("signal", Identifier, nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("retracts", Identifier),
        sa.Column("digest", sa.String(16), nullable=False),
        schema=schema,
    )
    op.create_index("causalrm_events_by_impression", events.name, ["impression_id", "time", "id"], schema=schema)
    withdraws = sa.text("retracts IS NOT NULL")
    where = {"sqlite_where": withdraws, "postgresql_where": withdraws}
    op.create_index("causalrm_events_by_retracts", events.name, ["retracts"], schema=schema, **where)
    state = op.create_table(
        table_name("log_state", dialect),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("redelivered", sa.BigInteger, nullable=False),
        sa.Column("forgotten", sa.BigInteger, nullable=False),
        schema=schema,
    )
    op.create_table(
        table_name("forgotten", dialect),
        sa.Column("id_hash", sa.String(32), primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        schema=schema,
    )
    return impressions, events, state


def _old_tables(connection: sa.Connection) -> dict[str, sa.Table]:
    """The tables of the layout without a prefix; empty where any of them is missing or not ours."""
    found, there = sa.inspect(connection), {}
    for name, layouts in _LAYOUTS.items():
        if not found.has_table(name):
            return {}
        columns = tuple(column["name"] for column in found.get_columns(name))
        if columns not in layouts and columns not in [(*layout, "digest") for layout in layouts]:
            return {}
        there[name] = sa.Table(name, sa.MetaData(), *map(sa.Column, columns))
    return there


def _check(connection: sa.Connection, old: Mapping[str, sa.Table]) -> tuple[int, int]:
    """Position and redelivered of the old log. Raises InputError for a damaged one: new digests would hide it."""
    states = connection.execute(sa.select(old["log_state"].c.position, old["log_state"].c.redelivered)).all()
    if len(states) != 1:
        raise InputError(f"log_state must hold one row, got {len(states)}: the log is damaged")
    counts = [sa.select(sa.func.count()).select_from(old[name]) for name in ("impressions", "events")]
    rows = sum(connection.execute(count).scalar_one() for count in counts)
    if rows != states[0].position:
        raise InputError(f"the log must hold {states[0].position} rows, got {rows}: it is damaged")
    return tuple(states[0])


def _move(connection: sa.Connection, old: sa.Table, new: sa.Table, plain: bool) -> None:
    """Copy all rows; `plain`: their prompts are texts, each one turn of a user."""
    after, columns = 0, [column.name for column in new.c if column.name != "digest"]
    while rows := connection.execute(sa.select(old).where(old.c.seq > after).order_by(old.c.seq).limit(_ROWS_PER_BATCH)).all():
        copies = [_checked(old.name, dict(row._mapping)) for row in rows]
        for copy in copies:
            if plain:
                copy["prompt"] = _user_turn(copy["prompt"])
            copy |= {name: copy.get(name) for name in columns}
            copy["digest"] = _digest([copy[name] for name in columns])
        op.bulk_insert(new, copies)
        after = rows[-1].seq


def _checked(table: str, row: dict[str, Any]) -> dict[str, Any]:
    """An old row without its digest, which must be right; rows from before there was one have none."""
    digest = row.pop("digest", None)
    if digest not in (None, _digest(list(row.values()))):
        raise InputError(f"{table} {row['id']!r} must be as it was written, got another digest: the log is damaged")
    return row


def _digest(columns: Sequence[Any]) -> str:
    values = [value + 0.0 if isinstance(value, float) else value for value in columns]
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def _user_turn(text: str) -> str:
    return json.dumps([{"content": text, "role": "user"}], ensure_ascii=False, separators=(",", ":"))
