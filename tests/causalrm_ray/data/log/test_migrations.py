"""The log's tables: made beside those of others, brought from the layout before them, and refused where they are newer."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.migrations import _scripts
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.log.tables import log_tables, table_schema
from causalrm_ray.errors import InputError
from causalrm_ray.types import FeedbackEvent, Impression

SIGNALS = {"upvote": 1, "downvote": 0}
CONVERSATION = ("conversation_id", "model", "logprob", "asked_for_feedback")
TYPES = {
    **{"id": "VARCHAR(255)", "impression_id": "VARCHAR(255)", "signal": "VARCHAR(255)", "retracts": "VARCHAR(255)"},
    **{
        "seq": "BIGINT",
        "policy_version": "BIGINT",
        "position": "BIGINT",
        "redelivered": "BIGINT",
        "asked_for_feedback": "INTEGER",
    },
    **{"time": "DOUBLE PRECISION", "value": "DOUBLE PRECISION", "logprob": "DOUBLE PRECISION"},
}
IMPRESSIONS = [
    ("a", 1, 'why "é"?\n', "because", 3, 1.5, "u1", "{}"),
    ("b", 3, '[{"role":"user"}] is what I typed', "so?", 0, -0.0, None, '{"k": "v"}'),
]
EVENTS = [
    ("e", 2, "a", "upvote", 1.0, 2.0, None),
    ("w", 4, "a", "retract", 1.0, 3.0, "e"),
    ("x", 5, "b", "downvote", 0.0, 1.0, None),
]


def digest(row: tuple) -> str:
    values = [value + 0.0 if isinstance(value, float) else value for value in row]
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind that is nobody else's."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").new_database()
    return f"sqlite:///{tmp_path / 'team.db'}"


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine: Engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def make_old_log(
    url: str,
    impressions: list[tuple] = IMPRESSIONS,
    events: list[tuple] = EVENTS,
    *,
    digests: bool = True,
    more: tuple[str, ...] = (),
) -> None:
    """A log as versions before left it; `more`: columns at the end of its impressions."""
    columns = {
        "impressions": ("id", "seq", "prompt", "response", "policy_version", "time", "user", "context", *more),
        "events": ("id", "seq", "impression_id", "signal", "value", "time", "retracts"),
        "log_state": ("id", "position", "redelivered"),
    }
    rows = {"impressions": impressions, "events": events, "log_state": [(1, len(impressions) + len(events), 7)]}
    with connected(url) as connection:
        for table, names in columns.items():
            named = (*names, "digest") if digests and table != "log_state" else names
            typed = ", ".join(f'"{name}" {TYPES.get(name, "TEXT")}' for name in named)
            connection.execute(text(f"CREATE TABLE {table} ({typed}, PRIMARY KEY (id))"))
            for row in rows[table]:
                full = (*row, digest(row)) if len(named) > len(names) else row
                marks = ", ".join(f":p{number}" for number in range(len(named)))
                connection.execute(
                    text(f"INSERT INTO {table} VALUES ({marks})"), {f"p{number}": value for number, value in enumerate(full)}
                )


def schema_of(url: str) -> dict[str, Any]:
    """Columns, indexes and rows of every table in the default schema but ours."""
    with connected(url) as connection:
        found = inspect(connection)
        names = [name for name in found.get_table_names() if not name.startswith("causalrm_")]
        return {
            name: (
                [(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(name)],
                found.get_pk_constraint(name),
                found.get_indexes(name),
                connection.execute(text(f"SELECT * FROM {name}")).all(),
            )
            for name in names
        }


def tables_of(url: str) -> set[str]:
    with connected(url) as connection:
        return set(inspect(connection).get_table_names())


@pytest.mark.parametrize("columns", ["id TEXT PRIMARY KEY, page TEXT", "id TEXT PRIMARY KEY, seq BIGINT, digest TEXT"])
def test_a_teams_own_tables_are_left_as_they_are(database_url: str, columns: str) -> None:
    with connected(database_url) as connection:
        for name in ("impressions", "events", "log_state"):
            connection.execute(text(f"CREATE TABLE {name} ({columns})"))
            connection.execute(text(f"INSERT INTO {name} (id) VALUES ('theirs')"))
        connection.execute(text("CREATE INDEX events_by_impression ON events (id)"))
    before = schema_of(database_url)
    for _ in range(2):
        with closing(FeedbackLog(database_url, SIGNALS)) as log:
            log.append([Impression("a", Conversation.user("p"), "r", 0, 1.0)], [FeedbackEvent("e", "a", "upvote", 1.0, 2.0)])
            assert log.snapshot()["label"][:] == [1]
    assert schema_of(database_url) == before
    assert len(before) == 3


@pytest.mark.parametrize("missing", ["impressions", "events", "log_state"])
def test_tables_like_ours_are_theirs_unless_all_are_there(database_url: str, missing: str) -> None:
    make_old_log(database_url)
    with connected(database_url) as connection:
        connection.execute(text(f"DROP TABLE {missing}"))
    before = schema_of(database_url)
    with closing(FeedbackLog(database_url, SIGNALS)) as log:
        assert log.counts().impressions == 0
    assert schema_of(database_url) == before


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "no digests"])
def test_an_old_log_moves_with_every_row_and_position(database_url: str, digests: bool) -> None:
    make_old_log(database_url, digests=digests)
    with closing(FeedbackLog(database_url, SIGNALS)) as log:
        rows = log.snapshot().to_list()
        assert [(row["impression_id"], row["label"], row["user"], row["policy_version"]) for row in rows] == [
            ("b", 0, None, 0),
            ("a", None, "u1", 3),
        ]
        assert [json.loads(row["prompt"]) for row in rows] == [
            [{"role": "user", "content": IMPRESSIONS[1][2]}],
            [{"role": "user", "content": IMPRESSIONS[0][2]}],
        ]
        assert all(row[name] is None for row in rows for name in CONVERSATION)
        assert [(seq, event.id) for seq, event in log.stream()] == [(2, "e"), (4, "w"), (5, "x")]
        assert (log.position(), log.counts().redelivered) == (5, 7)
        known = Impression("a", Conversation.user(IMPRESSIONS[0][2]), "because", 3, 1.5, "u1")
        assert log.append([known]).impressions == 0
        assert log.append(events=[FeedbackEvent("y", "a", "upvote", 1.0, 9.0)]).events == 1
        assert log.position() == 6
    assert not tables_of(database_url) & {"impressions", "events", "log_state"}
    with closing(FeedbackLog(database_url, SIGNALS)) as log:
        assert log.counts().impressions == 2


def test_prompts_that_are_conversations_already_stay_what_they_are(database_url: str) -> None:
    prompt = Conversation.of([{"role": "system", "content": "short"}, {"role": "user", "content": "why?"}]).json
    make_old_log(database_url, [("a", 1, prompt, "r", 0, 1.0, None, "{}", "c1", "m", -0.5, 1)], [], more=CONVERSATION)
    with closing(FeedbackLog(database_url, SIGNALS)) as log:
        (row,) = log.snapshot().to_list()
    assert (row["prompt"], *(row[name] for name in CONVERSATION)) == (prompt, "c1", "m", -0.5, 1)


def test_more_rows_than_a_batch_move(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scripts().get_revision("0001").module, "_ROWS_PER_BATCH", 3)
    make_old_log(database_url, [(f"i{n}", n, "p", f"r{n}", 0, float(n), None, "{}") for n in range(1, 11)], [])
    with closing(FeedbackLog(database_url, SIGNALS)) as log:
        assert log.snapshot()["response"][:] == [f"r{n}" for n in range(1, 11)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE events SET signal = 'downvote' WHERE id = 'e'", "events 'e' must be as it was written"),
        ("DELETE FROM events WHERE id = 'x'", "must hold 5 rows, got 4"),
        ("DELETE FROM log_state", "log_state must hold one row, got 0"),
    ],
)
def test_a_damaged_old_log_is_refused_and_left_as_it_is(database_url: str, change: str, message: str) -> None:
    make_old_log(database_url)
    with connected(database_url) as connection:
        connection.execute(text(change))
    before = schema_of(database_url)
    with pytest.raises(InputError, match=message):
        FeedbackLog(database_url, SIGNALS)
    assert schema_of(database_url) == before
    assert not [name for name in tables_of(database_url) if name.startswith("causalrm_")]


def test_tables_are_what_the_code_reads(log_url: str) -> None:
    FeedbackLog(log_url, SIGNALS).close()
    with connected(log_url) as connection:
        schema, dialect = table_schema(connection.dialect.name), connection.dialect.name
        version = "alembic_version" if schema else "causalrm_alembic_version"
        options = {"include_schemas": True, "version_table": version, "version_table_schema": schema, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, log_tables(dialect).metadata) == []


def test_a_log_of_a_newer_version_is_refused(log_url: str) -> None:
    FeedbackLog(log_url, SIGNALS).close()
    version = "causalrm.alembic_version" if "postgresql" in log_url else "causalrm_alembic_version"
    with connected(log_url) as connection:
        connection.execute(text(f"UPDATE {version} SET version_num = '9999'"))
    with pytest.raises(InputError, match="revision up to 0001, got 9999: a newer causalrm-ray made them"):
        FeedbackLog(log_url, SIGNALS)


def test_tables_under_our_names_that_we_did_not_make_are_refused(log_url: str) -> None:
    postgres = "postgresql" in log_url
    with connected(log_url) as connection:
        if postgres:
            connection.execute(text("CREATE SCHEMA causalrm"))
        connection.execute(text(f"CREATE TABLE {'causalrm.events' if postgres else 'causalrm_events'} (id INTEGER)"))
    with pytest.raises(InputError, match=r"got (causalrm_)?events without it: not made by us"):
        FeedbackLog(log_url, SIGNALS)


def _open(url: str, start: Any, found: Any) -> None:
    start.wait()
    with closing(FeedbackLog(url, SIGNALS)) as log:
        found.put(log.counts().impressions)


@pytest.mark.parametrize("old", [False, True], ids=["no log", "an old log"])
def test_several_processes_open_or_upgrade_one_database_at_once(database_url: str, old: bool) -> None:
    if old:
        make_old_log(database_url)
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open, args=(database_url, start, found)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [found.get() for _ in processes] == [2 if old else 0] * 4


def test_tables_that_another_process_makes_between_two_looks_are_ours(log_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = MigrationContext.get_current_revision

    def other_process_first(context: MigrationContext) -> str | None:
        revision = look(context)
        if MigrationContext.get_current_revision is other_process_first:
            monkeypatch.setattr(MigrationContext, "get_current_revision", look)
            FeedbackLog(log_url, SIGNALS).close()
        return revision

    monkeypatch.setattr(MigrationContext, "get_current_revision", other_process_first)
    FeedbackLog(log_url, SIGNALS).close()
    assert MigrationContext.get_current_revision is look


def test_postgresql_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("No module named 'psycopg'")

    monkeypatch.setattr("causalrm_ray.data.log.database.create_engine", missing)
    with pytest.raises(InputError, match=r"pip install 'causalrm-ray\[postgres\]'"):
        FeedbackLog("postgresql://me:secret@nowhere/db", SIGNALS)
