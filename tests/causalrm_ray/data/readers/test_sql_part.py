"""A query on somebody's database: its rows, in a stream, and never a change to it."""

from __future__ import annotations

import hashlib
import itertools
import re
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.data.readers.sql_part import SqlPart
from causalrm_ray.data.rows import RawRow, SourceError
from causalrm_ray.data.sources import parts


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop 1.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE chats (id INTEGER PRIMARY KEY, question TEXT, answer TEXT, at TIMESTAMP, stars REAL)")
        database.executemany("INSERT INTO chats VALUES (?, 'q', 'a', '10:30', ?)", [(n, n % 5) for n in range(2500)])
    database.close()
    return path


def read(path: Path, query: str) -> list:
    return list(SqlPart(f"sqlite:///{path}", query, "feedback.query").rows())


def test_rows_of_a_query_are_read_by_its_names(shop: Path) -> None:
    before = hashlib.sha256(shop.read_bytes()).hexdigest()
    rows = read(shop, "WITH c AS (SELECT * FROM chats) SELECT id, question AS prompt, stars FROM c WHERE at = '10:30' -- all;\n;")
    assert len(rows) == 2500
    assert rows[7].fields == {"id": 7, "prompt": "q", "stars": 2.0}
    assert (rows[7].number, rows[7].where) == (8, f"sqlite:///{shop} (feedback.query)")
    assert hashlib.sha256(shop.read_bytes()).hexdigest() == before
    assert [path.name for path in shop.parent.iterdir()] == [shop.name]


@pytest.mark.parametrize(
    "query", ["DELETE FROM chats", "SELECT 1; DROP TABLE chats", "", "-- SELECT\nDROP TABLE chats", "PRAGMA writable_schema=1"]
)
def test_what_is_not_one_select_is_refused_before_it_runs(shop: Path, query: str) -> None:
    with pytest.raises(SourceError, match=r"feedback\.query must be one SELECT, which may begin with WITH"):
        read(shop, query)


def test_a_change_inside_of_a_query_is_refused_by_the_database(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("causalrm_ray.data.readers.sql_part.READS", re.compile(""))
    with pytest.raises(SourceError, match="attempt to write a readonly database"):
        read(shop, "DELETE FROM chats")


def test_what_cannot_be_asked_is_named(shop: Path) -> None:
    with pytest.raises(SourceError, match=r"\(feedback\.query\) must give rows, .* says: no such table: absent"):
        read(shop, "SELECT * FROM absent")
    with pytest.raises(SourceError, match=r"shop\.db: no such file or folder; did you mean .*shop 1\.db\?"):
        read(shop.with_name("shop.db"), "SELECT 1")
    with pytest.raises(SourceError, match=r"is a database: feedback\.query must hold the SELECT"):
        parts(f"sqlite:///{shop}")
    with pytest.raises(SourceError, match=r"feedback\.query asks a database: feedback\.source must be its SQLAlchemy URL"):
        parts(str(shop), query="SELECT 1")


def test_passwords_are_never_shown() -> None:
    with pytest.raises(SourceError) as caught:
        list(SqlPart("postgresql+psycopg://me:hush@127.0.0.1:1/shop", "SELECT 1", "feedback.query").rows())
    assert "hush" not in str(caught.value)
    with pytest.raises(SourceError) as caught:
        parts("postgresql://me:hush@127.0.0.1:1/shop")
    assert "hush" not in str(caught.value)


ROWS = """
CREATE TABLE chats
(id uuid DEFAULT gen_random_uuid(), question text, meta jsonb, at timestamptz, day date, stars numeric(3, 1));
INSERT INTO chats (question, meta, at, day, stars)
SELECT 'q ' || n, jsonb_build_object('user', 'u' || n % 7), to_timestamp(n), '2026-01-02', n % 5
FROM generate_series(1, 30000) n;
CREATE FUNCTION wipe() RETURNS void LANGUAGE sql AS 'DELETE FROM chats'"""


@pytest.mark.postgres
def test_postgresql_is_read_in_a_stream_and_never_changed(postgres: Any) -> None:
    url = postgres.new_database()
    with postgres.connect(url.rsplit("/", 1)[1]) as database:
        database.execute(ROWS)

        def read(query: str) -> list[RawRow]:
            return list(SqlPart(url, query, "feedback.query").rows())

        query = "SELECT *, 7 % 4 AS rest FROM chats WHERE question LIKE 'q %' AND meta ->> 'user' <> 'a:b'"
        rows = read(f"{query} AND day = '2026-01-02'::date ORDER BY at")
        assert len(rows) == 30_000
        assert {name: value for name, value in (rows[0].fields or {}).items() if name != "id"} == {
            **{"question": "q 1", "meta": {"user": "u1"}, "at": datetime.fromtimestamp(1, UTC), "day": "2026-01-02"},
            **{"stars": 1.0, "rest": 3},
        }
        for change in ("WITH gone AS (DELETE FROM chats RETURNING *) SELECT * FROM gone", "SELECT wipe()"):
            with pytest.raises(SourceError, match=r"must give rows, but after 0 of them the database says"):
                read(change)
        with pytest.raises(SourceError, match="a value does not fit its type") as caught:
            read("SELECT question::int FROM chats")
        assert "q 1" not in str(caught.value)
        tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
        assert database.execute(f"SELECT (SELECT count(*) FROM chats), ({tables})").fetchone() == (30_000, 1)


@pytest.mark.postgres
def test_rows_of_postgresql_are_streamed(postgres: Any) -> None:
    """The first rows of a query that would never end come at once."""
    url = postgres.new_database()
    part = SqlPart(url, "SELECT generate_series(1, 1000000000) AS id", "feedback.query")
    assert [row.fields for row in itertools.islice(part.rows(), 2)] == [{"id": 1}, {"id": 2}]
