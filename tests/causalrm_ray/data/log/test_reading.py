"""How a source is read: the format of each file, columns by our names, events in a source of their own, values that are text."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causalrm_ray.config.train import Thresholds
from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.log.import_log import ImportReport, import_log
from causalrm_ray.data.log.reading import Origin
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rows import SourceError
from causalrm_ray.errors import InputError
from causalrm_ray.registry import FORMATS

SIGNALS = {"upvote": 1, "downvote": 0, "copy": 1, "stars": Thresholds(low=2, high=4), "judge": None}
GOOD = {"prompt": "p", "response": "r"}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[FeedbackLog]:
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/log/log.db", SIGNALS)) as log:
        yield log


def write(path: Path, rows: list[Any], lines: bool = True) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return str(path)


def labels(log: FeedbackLog) -> dict[str, int | None]:
    return {row["impression_id"]: row["label"] for row in log.snapshot()}


def imported(log: FeedbackLog, source: Any, **options: Any) -> ImportReport:
    return import_log(Origin(source, **options), log, Path(log._engine.url.database).parent / "bad.jsonl")  # type: ignore[arg-type]


SHOWN = [{**GOOD, "id": name} for name in "abcd"]
DONE = [
    {"impression_id": "a", "signal": "upvote", "time": 9},
    {"impression_id": "b", "label": 0},
    {"impression_id": "c", "label": 1},
]
EXPECTED = {"a": 1, "b": 0, "c": 1, "d": None}


def test_a_folder_or_a_list_may_hold_answers_in_one_file_and_events_in_another(log: FeedbackLog, tmp_path: Path) -> None:
    done, shown = write(tmp_path / "in" / "1.jsonl", DONE), write(tmp_path / "in" / "2.json", SHOWN, lines=False)
    first = imported(log, str(tmp_path / "in"))
    assert (first.rows, first.impressions, first.events, first.formats, labels(log)) == (7, 4, 3, ("native",), EXPECTED)
    assert imported(log, [shown, done]).duplicate_events == 3


def test_events_may_be_a_source_of_their_own(log: FeedbackLog, tmp_path: Path) -> None:
    shown, done = write(tmp_path / "s.jsonl", SHOWN), write(tmp_path / "e.jsonl", [*DONE, SHOWN[0]])
    report = imported(log, shown, events=done)
    assert (report.impressions, report.events, report.quarantined, labels(log)) == (4, 3, 1, EXPECTED)
    refused = json.loads((tmp_path / "log" / "bad.jsonl").read_text())
    assert refused["reason"] == "a row of feedback.events must be an event, got an answer that was shown"


def test_a_query_and_a_query_of_events_are_read_from_one_database(log: FeedbackLog, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "shop.db")) as shop:
        shop.execute("CREATE TABLE chats (id, q, a)")
        shop.execute("CREATE TABLE votes (chat, liked)")
        shop.executemany("INSERT INTO chats VALUES (?, 'p', 'r')", "abcd")
        shop.executemany("INSERT INTO votes VALUES (?, ?)", [("a", 1), ("b", 0), ("c", 1)])
        shop.commit()
    report = imported(
        log,
        f"sqlite:///{tmp_path}/shop.db",
        query="SELECT id, q AS prompt, a AS response FROM chats",
        events="SELECT chat AS impression_id, liked AS label FROM votes",
    )
    assert (report.impressions, report.events, labels(log)) == (4, 3, EXPECTED)


def test_a_source_is_named_without_its_password() -> None:
    assert str(Origin("postgresql://me:hush@host/shop", query="SELECT 1")) == "postgresql://host/shop"
    assert str(Origin(["https://me:hush@host/a.csv?key=hush", "b.csv"])) == "https://host/a.csv and 1 more"


def test_a_log_of_their_own_is_read_by_columns(log: FeedbackLog, tmp_path: Path) -> None:
    rows = [
        {"q": "why?", "choices": [{"message": {"content": "so"}}], "meta": {"who": "u1"}, "key": "a", "thumb": "true", "cost": 1},
        {"q": "why?", "choices": [{"message": {"content": "no"}}], "meta": {}, "key": "b", "thumb": "no"},
        {"q": "why?", "choices": [], "meta": None, "key": "c", "thumb": None},
    ]
    columns = {"prompt": "q", "response": "choices.0.message.content", "user": "meta.who", "id": "key", "label": "thumb"}
    report = imported(log, write(tmp_path / "in.jsonl", rows), columns=columns)
    assert (report.impressions, report.quarantined, report.ignored_columns, report.formats) == (2, 1, ("cost",), ("native",))
    assert labels(log) == {"a": 1, "b": 0}
    assert [row["user"] for row in log.snapshot()] == ["u1", None]
    assert report.warnings == ("2 labels were text, such as true or 1, and are read as 1 and 0",)


def test_a_column_of_a_signal_holds_its_value_and_a_zero_of_a_plain_one_is_none(log: FeedbackLog, tmp_path: Path) -> None:
    rows = [
        {**GOOD, "id": "a", "rating": 5, "copied": 0},
        {**GOOD, "id": "b", "rating": "1", "copied": "0"},
        {**GOOD, "id": "c", "rating": 3, "copied": False},
        {**GOOD, "id": "d", "rating": None, "copied": None},
        {**GOOD, "id": "e", "rating": 3, "copied": True},
        {**GOOD, "id": "f", "rating": "good", "copied": None},
        {"impression_id": "d", "rating": 4, "time": 7},
    ]
    report = imported(log, write(tmp_path / "in.jsonl", rows), columns={"stars": "rating", "copy": "copied"})
    assert labels(log) == {"a": 1, "b": 0, "c": None, "d": 1, "e": 1}
    assert (report.events, report.quarantined, report.ignored_columns) == (6, 1, ())
    refused = json.loads((tmp_path / "log" / "bad.jsonl").read_text())
    assert refused["reason"] == "rating must be a number, the value of the signal 'stars', got 'good'"


def test_a_column_of_the_name_of_a_graded_signal_needs_no_mapping(log: FeedbackLog, tmp_path: Path) -> None:
    rows = [{**GOOD, "id": "a", "stars": 5}, {**GOOD, "id": "b", "stars": 0}, {**GOOD, "id": "c", "copy": 1, "rating": 2}]
    report = imported(log, write(tmp_path / "in.jsonl", rows))
    assert labels(log) == {"a": 1, "b": 0, "c": None}
    assert report.ignored_columns == ("copy", "rating")
    assert [note[:72] for note in report.warnings] == [
        "the column copy is ignored: feedback.columns.copy=copy reads it as a sig",
        "the column rating is ignored: feedback.columns.rating=rating reads it as",
    ]


def test_text_is_typed_by_what_its_column_means(log: FeedbackLog, tmp_path: Path) -> None:
    header = "id,prompt,response,label,time,policy_version,logprob,asked_for_feedback,context,events\n"
    chat = json.dumps([{"role": "user", "content": "1"}]).replace('"', '""')
    events = json.dumps([{"signal": "stars", "value": "5", "time": "5"}]).replace('"', '""')
    rows = f'007,"{chat}",true,1.0,60.5,3,-1.5,True,"{{""device"": ""tv""}}",\n8,1,[1],,1970-01-01,,,,,"{events}"\n'
    (tmp_path / "in.csv").write_text(header + rows)
    report = imported(log, str(tmp_path / "in.csv"))
    first, second = sorted(log.snapshot(), key=lambda row: row["impression_id"])
    assert (first["impression_id"], first["response"], first["label"], first["time"]) == ("007", "true", 1, 60.5)
    assert (first["policy_version"], first["logprob"], first["asked_for_feedback"]) == (3, -1.5, 1)
    assert json.loads(first["context"]) == {"device": "tv"}
    assert (second["response"], second["label"], second["time"], second["policy_version"]) == ("[1]", 1, 0.0, 0)
    assert (report.quarantined, report.formats) == (0, ("native",))


@pytest.mark.parametrize(
    ("time", "seconds", "unit"),
    [
        (1_767_225_600, 1_767_225_600, ""),
        (1_767_225_600_000, 1_767_225_600, "milli"),
        (1_767_225_600_000_000, 1_767_225_600, "micro"),
        (1.767_225_6e18, 1_767_225_600, "nano"),
        ("1767225600000", 1_767_225_600, "milli"),
        ("1767225600.5", 1_767_225_600.5, ""),
        ("2026-01-01", 1_767_225_600, ""),
        ("20260101", 1_767_225_600, ""),
        ("2026-01-01T02:00:00+02:00", 1_767_225_600, ""),
    ],
)
def test_times_of_any_unit_are_seconds(log: FeedbackLog, tmp_path: Path, time: Any, seconds: float, unit: str) -> None:
    report = imported(log, write(tmp_path / "in.jsonl", [{**GOOD, "time": time}]))
    assert log.snapshot()[0]["time"] == seconds
    assert report.warnings == ((f"1 times were {unit}seconds, by their size, and are read so",) if unit else ())


class Pairs:
    """`ask` and `say`; votes in another file, as `on` and `vote`."""

    columns = frozenset({"ask", "say", "key", "on", "vote"})

    @classmethod
    def matches(cls, columns: frozenset[str], rows: list[Mapping[str, Any]]) -> float:
        assert all(None not in row.values() for row in rows)
        return float({"ask", "say"} <= columns or {"on", "vote"} <= columns)

    def read(self, fields: Mapping[str, Any]) -> Iterator[LoggedImpression | LoggedEvent]:
        if "on" in fields:
            yield LoggedEvent(label=fields["vote"], impression_id=fields["on"])
        else:
            yield LoggedImpression(fields["ask"], fields["say"], id=fields["key"])


class Twin(Pairs):
    """The same columns again."""


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_registered", {"pairs": Pairs})


def test_each_file_is_read_in_the_format_that_it_shows(log: FeedbackLog, tmp_path: Path, pairs: None) -> None:
    write(tmp_path / "in" / "1.jsonl", [{"ask": "p", "say": "r", "key": name, "x": None} for name in "ab"])
    write(tmp_path / "in" / "2.jsonl", [{"on": "a", "vote": 1}, {"on": "c", "vote": True}])
    pq.write_table(pa.Table.from_pylist(SHOWN[2:]), tmp_path / "in" / "3.parquet")
    report = imported(log, str(tmp_path / "in"))
    assert labels(log) == {"a": 1, "b": None, "c": 1, "d": None}
    assert (report.formats, report.ignored_columns) == (("pairs", "native"), ("x",))


def test_a_tie_of_formats_is_refused_and_a_given_format_is_taken(
    log: FeedbackLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FORMATS, "_registered", {"pairs": Pairs, "twin": Twin})
    source = write(tmp_path / "1.jsonl", [{"ask": "p", "say": "r", "key": "a"}])
    with pytest.raises(SourceError, match=r"looks like several formats, pairs and twin: feedback\.format=pairs chooses one"):
        imported(log, source)
    assert imported(log, source, format="twin").formats == ("twin",)


def test_scores_and_scales_refuse_a_source_in_any_format_before_a_row_is_imported(
    log: FeedbackLog, tmp_path: Path, pairs: None
) -> None:
    rows = [{"ask": "p", "say": "r", "key": str(number)} for number in range(3000)]
    rows += [{"on": "1", "vote": stars} for stars in (1, 5, 2)]
    with pytest.raises(SourceError, match="label must be 0 or 1, got 1, 2, 5 in 2 rows, first in row 3002; a scale is a signal"):
        imported(log, write(tmp_path / "in.jsonl", rows))
    assert log.counts().impressions == 0


def test_a_mapping_must_name_a_column_that_is_there_and_one_that_means_something(log: FeedbackLog, tmp_path: Path) -> None:
    rows = [{**GOOD, "rating": 1}, *[GOOD] * 200, {**GOOD, "late": 1}]
    source = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(
        SourceError,
        match=r"feedback\.columns\.label must name a column, .*: no row has 'rate'; there are prompt, rating, response",
    ):
        imported(log, source, columns={"label": "rate"})
    with pytest.raises(
        InputError, match=r"feedback\.columns\.grade: .* neither a column of the format native nor one of feedback\.s"
    ):
        imported(log, source, columns={"grade": "rating"})
    assert imported(log, source, columns={"label": "late"}).events == 1, "a column of a later row than the first ones"
