"""What is forgotten leaves the log and its files for ever, and everything else stays what it was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.import_log import import_log
from causalrm_ray.data.log.store import FeedbackLog, Written
from causalrm_ray.types import FeedbackEvent, Impression

SIGNALS = {"upvote": 1, "downvote": 0}
SECRET = "my landlord's name is Zebediah"


def shown(name: str, user: str | None = None, text: str = "why?") -> Impression:
    return Impression(name, Conversation.user(text), f"answer to: {text}", 0, 1.0, user)


def did(name: str, impression: str) -> FeedbackEvent:
    return FeedbackEvent(name, impression, "upvote", 1.0, 2.0)


@pytest.fixture
def log(log_url: str) -> Iterator[FeedbackLog]:
    with closing(FeedbackLog(log_url, SIGNALS)) as log:
        yield log


def ids(log: FeedbackLog) -> list[str]:
    return log.snapshot()["impression_id"][:]


def test_a_user_leaves_with_all_events_and_the_rest_stays(log: FeedbackLog) -> None:
    log.append([shown("a", "ann", SECRET), shown("b", "bob"), shown("c", "ann")], [did("x", "a"), did("y", "b"), did("z", "a")])
    found = log.find(user="ann")
    assert (found.ids, len(found.prompts)) == (("a", "c"), 2)
    assert log.forget(found.ids, time=9.0) == (2, 2)
    assert ids(log) == ["b"]
    assert [(seq, event.id) for seq, event in log.stream()] == [(5, "y")]
    assert (log.position(), log.counts().forgotten) == (6, 4)
    log.append([shown("d", "dan")])
    assert log.position() == 7
    assert ids(log) == ["b", "d"], "the log verifies"


def test_what_was_forgotten_stays_out(log: FeedbackLog) -> None:
    batch = [shown("a", "ann"), shown("b", "bob")], [did("x", "a"), did("y", "b")]
    log.append(*batch)
    log.forget(["a"], time=9.0)
    assert log.append(*batch) == Written(0, 0, forgotten_impressions=1, forgotten_events=1)
    assert log.append(events=[did("late", "a")]) == Written(0, 0, forgotten_events=1)
    assert log.forget(["a"], time=10.0) == (0, 0), "again, it changes nothing"
    assert ids(log) == ["b"]
    assert log.counts().redelivered == 2


def test_an_impression_that_has_not_arrived_is_forgotten_in_advance(log: FeedbackLog) -> None:
    log.append(events=[did("early", "a")])
    found = log.find(impression="a")
    assert found.ids == ("a",)
    assert log.forget(found.ids, time=9.0) == (0, 1)
    assert log.append([shown("a")]) == Written(0, 0, forgotten_impressions=1)
    assert log.find(user="nobody").ids == ()
    assert log.forget([], time=9.0) == (0, 0)


def test_importing_again_counts_what_was_forgotten(log: FeedbackLog, tmp_path: Path) -> None:
    source = tmp_path / "log.jsonl"
    rows = [{"id": name, "prompt": "p", "response": name, "signal": signal} for name, signal in (("a", "upvote"), ("b", None))]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    import_log(str(source), log, tmp_path / "bad.jsonl")
    log.forget(["a"], time=9.0)
    report = import_log(str(source), log, tmp_path / "bad.jsonl")
    assert (report.rows, report.impressions, report.duplicate_impressions, report.forgotten) == (2, 0, 1, 1)
    assert (report.events, report.duplicate_events, report.quarantined) == (0, 0, 0)


def test_only_a_hash_of_the_id_is_left(log: FeedbackLog) -> None:
    log.append([shown("ann@home", "ann")])
    log.forget(["ann@home"], time=9.0)
    with log._engine.connect() as connection:
        (row,) = connection.execute(select(log._tables.forgotten)).all()
    assert row.time == 9.0
    assert "ann" not in row.id_hash
    assert len(row.id_hash) == 32


def test_no_byte_of_it_is_left_in_sqlite_files(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with closing(FeedbackLog(f"sqlite:///{path}", SIGNALS)) as log:
        log.append([shown(f"i{n}", "ann" if n % 7 == 0 else None, SECRET if n % 7 == 0 else "why?") for n in range(500)])
        log.forget(log.find(user="ann").ids, time=9.0)
        files = list(tmp_path.iterdir())
        assert not [file.name for file in files if b"Zebediah" in file.read_bytes()]
        assert len(ids(log)) == 500 - 72
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["show", "vote", "forget"])), max_size=20))
def test_a_log_that_forgot_is_one_that_never_knew_of_it(new_log_url, history: list[tuple[int, str]]) -> None:
    gone = {f"i{n}" for n, what in history if what == "forget"}
    with closing(FeedbackLog(new_log_url(), SIGNALS)) as log:
        for number, (n, what) in enumerate(history):
            if what == "show":
                log.append([shown(f"i{n}", f"u{n}")])
            elif what == "vote":
                log.append(events=[did(f"e{number}", f"i{n}")])
            else:
                log.forget([f"i{n}"], time=float(number))
        rows, events = log.snapshot().to_list(), [event.id for _, event in log.stream()]
        position, counts = log.position(), log.counts()
    kept = {f"i{n}" for n, what in history if what == "show"} - gone
    assert {row["impression_id"] for row in rows} == kept
    assert events == [f"e{k}" for k, (n, what) in enumerate(history) if what == "vote" and f"i{n}" not in gone]
    assert counts.impressions + counts.events + counts.forgotten == position
