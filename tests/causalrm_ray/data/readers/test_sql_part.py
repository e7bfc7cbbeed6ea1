"""A query on somebody's database: its rows, in a stream, and never a change to it."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from pathlib import Path

import pytest

from causalrm_ray.data.readers.sql_part import SqlPart
from causalrm_ray.data.rows import SourceError
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
