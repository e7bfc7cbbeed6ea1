"""Sealed snapshots: the same rows as the log's own, whatever came before; what is sealed is not read again."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, text

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.sealing import seal as sealing
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rollouts import kept_steps, rollout_path, write_rollout
from causalrm_ray.data.snapshots.table import read_batches, read_columns, read_snapshot
from causalrm_ray.errors import InputError
from causalrm_ray.types import Completion, FeedbackEvent, Impression, Prompt, Scored
from tests.causalrm_ray.data.log.test_store import ORDER, SIGNALS, SLOW, did, histories, shown


def rows_of(path: Path) -> list[dict[str, Any]]:
    return sorted(read_snapshot(path).to_list(), key=lambda row: (row["time"], row["impression_id"]))


def segments(folder: Path) -> dict[str, int]:
    """Names of the segments, and what differs where one is written again."""
    return {path.name: path.stat().st_ino for path in sorted((folder / "segments").iterdir())}


@pytest.fixture
def log(log_url: str):
    with closing(FeedbackLog(log_url, SIGNALS, ORDER)) as log:
        yield log


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 4 rows, of which one with fewer than 2 is sealed again."""
    monkeypatch.setattr(sealing, "MOST_ROWS", 4)
    monkeypatch.setattr(sealing, "FULL_ROWS", 2)


@SLOW
@given(histories(), st.randoms(use_true_random=False))
def test_a_sealed_snapshot_is_the_logs_own_at_any_moment(
    new_log_url: Callable[[], str], tmp_path_factory: pytest.TempPathFactory, history: Any, rng: random.Random
):
    impressions, events = history
    deliveries = [*impressions, *events]
    rng.shuffle(deliveries)
    folder = tmp_path_factory.mktemp("run")
    small = patch.multiple(sealing, MOST_ROWS=2, FULL_ROWS=2, ROWS_PER_PAGE=1)
    with small, closing(FeedbackLog(new_log_url(), SIGNALS, ORDER)) as log:
        for number in range(len(deliveries) + 1):
            batch = deliveries[number - 1 : number]
            log.append(
                [item for item in batch if isinstance(item, Impression)],
                [item for item in batch if isinstance(item, FeedbackEvent)],
            )
            if rng.random() < 0.1 and impressions:
                log.forget([rng.choice(impressions).id], 1.0)
            if rng.random() < 0.5 or number == len(deliveries):
                as_of = rng.choice([None, None, 0.0, 1.0, 2.5])
                assert rows_of(log.seal(folder, f"s{number % 3}", as_of)) == log.snapshot(as_of).to_list()


@pytest.mark.usefixtures("small")
def test_what_is_sealed_is_neither_read_nor_written_again(log: FeedbackLog, tmp_path: Path):
    log.append([shown(f"i{number}") for number in range(9)], [did("e0", "i0")])
    first = log.seal(tmp_path, "first")
    before = segments(tmp_path)
    assert len(before) == 3  # of 4, 4 and 1 rows
    log.append([shown("i9"), shown("i10")], [did("e1", "i1", "downvote"), did("late", "i0", "downvote", 9.0)])
    read: list[Any] = []
    engine: Any = log._engine
    event.listen(engine, "before_cursor_execute", lambda *given: read.append(given[2:4]))
    second = log.seal(tmp_path, "second")
    after = segments(tmp_path)
    assert {name: after[name] for name in list(before)[:2]} == {name: before[name] for name in list(before)[:2]}
    assert len(after) == 4  # the one of 1 row was sealed again; the first snapshot still has its own
    of_texts = [given for statement, given in read if "response" in statement.partition("FROM")[0]]
    assert len(of_texts) == 1
    assert 8 in (of_texts[0].values() if isinstance(of_texts[0], dict) else of_texts[0])  # after position 8
    assert [row["label"] for row in rows_of(first)[:2]] == [1, None]
    assert [row["label"] for row in read_snapshot(second)][:2] == [0, 0]
    assert rows_of(second) == log.snapshot().to_list()


@pytest.mark.usefixtures("small")
def test_what_is_forgotten_leaves_the_segments_at_the_next_seal(log: FeedbackLog, tmp_path: Path):
    log.append([shown(f"i{number}", response=f"Zebediah {number}") for number in range(6)], [did("e0", "i0")])
    log.seal(tmp_path, "first")
    log.forget(["i0"], 1.0)
    second = log.seal(tmp_path, "second")
    assert [row["impression_id"] for row in rows_of(second)] == ["i1", "i2", "i3", "i4", "i5"]
    assert rows_of(second) == log.snapshot().to_list()
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["second.parquet"]
    kept = [pq.read_table(tmp_path / "segments" / name)["response"].to_pylist() for name in segments(tmp_path)]
    assert [text for texts in kept for text in texts] == [f"Zebediah {number}" for number in range(1, 6)]


@pytest.mark.usefixtures("small")
def test_segments_of_another_log_are_not_its_own(new_log_url: Callable[[], str], tmp_path: Path):
    for name in ("one", "two"):
        with closing(FeedbackLog(new_log_url(), SIGNALS)) as log:
            log.append([shown(f"i{number}", response=f"{name} {number}") for number in range(6)], [did("e", "i1")])
            assert rows_of(log.seal(tmp_path, "log")) == log.snapshot().to_list()


def test_other_rules_read_the_same_segments(log_url: str, tmp_path: Path):
    with closing(FeedbackLog(log_url, {"copy": 1, "downvote": 0}, [["copy"]])) as log:
        log.append([shown("a")], [did("x", "a", "copy", 1.0), did("y", "a", "downvote", 2.0)])
        assert [row["label"] for row in rows_of(log.seal(tmp_path, "log"))] == [1]
        before = segments(tmp_path)
    with closing(FeedbackLog(log_url, {"copy": 1, "downvote": 0})) as log:
        assert [row["label"] for row in rows_of(log.seal(tmp_path, "log"))] == [0]
        assert segments(tmp_path) == before


@pytest.mark.usefixtures("small")
def test_an_interrupted_seal_goes_on(log: FeedbackLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log.append([shown(f"i{number}") for number in range(9)])
    write, written = sealing.write_segment, []

    def fail(*given: Any) -> None:
        written.append(given)
        if len(written) == 3:
            raise OSError("no space left")
        write(*given)

    monkeypatch.setattr(sealing, "write_segment", fail)
    with pytest.raises(OSError, match="no space"):
        log.seal(tmp_path, "log")
    before = segments(tmp_path)
    assert len(before) == 2
    assert rows_of(log.seal(tmp_path, "log")) == log.snapshot().to_list()
    assert len(written) == 4
    assert before.items() <= segments(tmp_path).items()


@pytest.mark.parametrize("sealed", [False, True])
def test_a_damaged_row_is_refused_once_before_it_is_sealed(tmp_path: Path, sealed: bool):
    with closing(FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", SIGNALS)) as log:
        log.append([shown("a")], [did("x", "a")])
        if sealed:
            log.seal(tmp_path, "first")
        log.append([shown("b")], [did("y", "b")])
        with log._engine.begin() as connection:
            connection.execute(text("UPDATE causalrm_impressions SET response = 'other' WHERE id = 'b'"))
        with pytest.raises(InputError, match="damaged: causalrm_impressions 'b' is not as it was written"):
            log.seal(tmp_path, "log")


def test_a_missing_segment_is_named(log: FeedbackLog, tmp_path: Path):
    log.append([shown("a")], [did("x", "a")])
    path = log.seal(tmp_path, "log")
    (segment,) = (tmp_path / "segments").iterdir()
    segment.unlink()
    with pytest.raises(InputError, match=rf"{segment.name} must be there, whole, for the snapshot .*log.parquet"):
        list(read_batches(path))
    assert rows_of(log.seal(tmp_path, "log")) == log.snapshot().to_list()


def test_columns_are_those_asked_for(log: FeedbackLog, tmp_path: Path):
    log.append([shown("a", 1.0), shown("b", 3.0)], [did("x", "a", time=1.0)])
    path = log.seal(tmp_path, "log", as_of=2.0)
    (batch,) = read_columns(path, ["label", "impression_id"])
    assert batch.to_pylist() == [{"label": 1, "impression_id": "a"}]


@pytest.mark.parametrize("kind", ["segments", "snapshots"])
def test_a_file_that_cannot_be_read_is_made_again(log: FeedbackLog, tmp_path: Path, kind: str):
    log.append([shown("a")], [did("x", "a")])
    log.seal(tmp_path, "first")
    (file,) = (tmp_path / kind).iterdir()
    file.write_bytes(file.read_bytes()[:50])
    log.append([shown("b")])
    assert rows_of(log.seal(tmp_path, "second")) == log.snapshot().to_list()


@pytest.mark.parametrize("lost", [False, True])
def test_labels_of_events_that_the_log_lost_are_not_gone_on_from(new_log_url: Callable[[], str], tmp_path: Path, lost: bool):
    """A log that went back to a backup, and has grown past where it was."""
    with closing(FeedbackLog(new_log_url(), SIGNALS)) as log:
        log.append([shown("a"), shown("b")], [did("x", "a"), did("y", "b", "downvote")])
        log.seal(tmp_path, "first")
    with closing(FeedbackLog(new_log_url(), SIGNALS)) as log:
        log.append([shown("a"), shown("b")], [did("z", "a", "downvote")] if lost else [did("x", "a"), did("y", "b", "downvote")])
        log.append([], [did(f"new {number}", "a", "downvote", 5.0) for number in range(3)])
        assert rows_of(log.seal(tmp_path, "second")) == log.snapshot().to_list()


def test_a_seal_after_forgetting_erases_what_rollouts_hold_of_it(log: FeedbackLog, tmp_path: Path):
    log.append([shown("a"), shown("b")], [did("x", "a")])
    log.seal(tmp_path, "first")
    unfinished = tmp_path / ".step-1.parquet.7.tmp"
    unfinished.touch()
    for step, prompt in enumerate(("ask a", "ask b")):
        request = Prompt("p", Conversation.user(prompt), (1,))
        write_rollout([Scored(Completion(request, "so", (3,), (-0.5,), "stop", 0), 0.1, 1)], rollout_path(tmp_path, step))
    log.forget(["a"], 1.0)
    log.seal(tmp_path, "second")
    assert kept_steps(tmp_path) == [1]
    assert unfinished.exists()  # of the run itself, which goes on
