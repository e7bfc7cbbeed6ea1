"""Import of foreign logs of every kind: each row is imported, known already, or quarantined with its number and reason."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.import_log import ImportReport, LengthLimit, import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rows import SourceError
from causalrm_ray.data.snapshots.table import write_snapshot
from causalrm_ray.data.sources import read_prompts

SIGNALS = {"upvote": 1, "downvote": 0}
GOOD = {"prompt": "p", "response": "r"}


@pytest.fixture
def log(log_url: str) -> Iterator[FeedbackLog]:
    with closing(FeedbackLog(log_url, SIGNALS)) as log:
        yield log


def jsonl(path: Path, *rows: dict | str | bytes) -> str:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode()
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def quarantined(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_sums(report: ImportReport) -> None:
    accepted = report.impressions + report.duplicate_impressions
    assert report.rows == accepted + report.quarantined
    assert accepted == report.events + report.duplicate_events + report.without_feedback


BAD_ROWS = [
    ("{not json", "row must be JSON in UTF-8"),
    (b'{"prompt": "\xff", "response": "r"}', "row must be JSON in UTF-8"),
    ("[" * 100_000, "row must be JSON in UTF-8"),
    ("[1]", "row must be a JSON object"),
    ({"response": "r"}, "prompt must be a text that is not empty, got None"),
    ({"prompt": "", "response": "r"}, "prompt must be a text that is not empty, got ''"),
    (
        {"prompt": [{"role": "system", "content": "s"}], "response": "r"},
        "prompt: the last message must be a user's or a tool's, got one of the system",
    ),
    ({"prompt": "p"}, "response must not be empty"),
    ({"prompt": "p", "response": 5}, "response must be text, got 5"),
    ({**GOOD, "id": ""}, "id must be a text or whole number that is not empty"),
    ({**GOOD, "signal": "dance"}, "signal must be one of ['disliked', 'downvote', 'liked', 'upvote'], got 'dance'"),
    ({**GOOD, "signal": ["upvote"]}, "signal must be one of"),
    ({**GOOD, "signal": "retract"}, "signal must be one of"),
    ({**GOOD, "label": [1]}, "label must be 0 or 1, got a list of 1 items"),
    ({**GOOD, "label": " "}, "label must be 0 or 1, got a text of 1 characters"),
    ({**GOOD, "time": 4e9}, "time must not be in the future, got 2096-10-02 07:06 UTC"),
    ('{"prompt": "p", "response": "r", "label": NaN}', "label must be 0 or 1, got nan"),
    ({**GOOD, "signal": "upvote", "label": 0}, "label must be that of the signal 'upvote', 1, got 0"),
    ({**GOOD, "signal": "upvote", "feedback": "downvote"}, "feedback must agree with signal 'upvote', got 'downvote'"),
    ('{"prompt": "p", "response": "r", "label": 1, "value": NaN}', "value must be a finite number, got nan"),
    ('{"prompt": "p", "response": "r", "time": 1e999}', "time must be a finite number, got inf"),
    ({**GOOD, "time": -1}, "time must be at least 0"),
    ({**GOOD, "time": "yesterday"}, "time must be seconds or an ISO date"),
    ({**GOOD, "policy_version": "new"}, "policy_version must be a whole number"),
    ({**GOOD, "context": "{"}, "context must be a mapping or a JSON object"),
    ({"prompt": "p", "response": "long " * 9}, "prompt and response must have a length of at most 5, got 10"),
]
LIMIT = LengthLimit(lambda prompt, response: (prompt.text + " " + response).split(), longest=5)


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_bad_row_is_quarantined_with_number_reason_and_raw_text(log: FeedbackLog, tmp_path: Path, bad, reason: str):
    source = jsonl(tmp_path / "in.jsonl", GOOD, "", bad, GOOD)
    report = import_log(source, log, tmp_path / "bad.jsonl", limit=LIMIT)
    (entry,) = quarantined(tmp_path / "bad.jsonl")
    assert (entry["source"], entry["row"]) == (source, 3)
    assert reason in entry["reason"]
    if isinstance(bad, dict):
        assert json.loads(entry["raw"]) == bad
    assert (report.rows, report.impressions, report.quarantined) == (3, 2, 1)
    check_sums(report)


def test_fields_become_records(log: FeedbackLog, tmp_path: Path):
    chat = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "now"}]
    source = jsonl(
        tmp_path / "in.jsonl",
        b"\xef\xbb\xbf" + json.dumps({**GOOD, "id": 7, "prompt": chat, "time": "1970-01-01T00:01:00", "user": 3}).encode(),
        {**GOOD, "id": "b", "signal": "downvote", "time": 5, "context": {"page": 2, "device": "tv", "no": None}, "topic": "t"},
        {**GOOD, "id": "c", "label": True, "policy_version": 4.0},
        {**GOOD, "id": "d", "feedback": 0},
        {**GOOD, "id": "e", "feedback": "upvote", "label": 1.0, "event_id": "mine", "value": 2.5},
        {**GOOD, "id": "f", "signal": None, "label": None, "feedback": None},
    )
    report = import_log(source, log, tmp_path / "bad.jsonl", default_time=1.0)
    assert report == ImportReport(6, 6, 0, 4, 0, 2, 0, ("topic",), formats=("native",))
    rows = {row["impression_id"]: row for row in log.snapshot()}
    assert {name: (row["signal"], row["label"], row["time"]) for name, row in rows.items()} == {
        "7": (None, None, 60.0),
        "b": ("downvote", 0, 5.0),
        "c": ("liked", 1, 1.0),
        "d": ("disliked", 0, 1.0),
        "e": ("upvote", 1, 1.0),
        "f": (None, None, 1.0),
    }
    assert (Conversation(rows["7"]["prompt"]).messages, rows["7"]["user"], rows["c"]["policy_version"]) == (chat, "3", 4)
    assert rows["b"]["context"] == '{"device": "tv", "page": "2"}'
    assert [(event.id, event.value) for _, event in log.stream() if event.value != 1.0] == [("mine", 2.5)]


def test_importing_again_changes_nothing_in_any_row_order(log: FeedbackLog, tmp_path: Path):
    rows = [GOOD, {**GOOD, "label": 1}, GOOD, {**GOOD, "id": "x", "label": 1}, {**GOOD, "id": "x", "label": 0}]
    first = import_log(jsonl(tmp_path / "a.jsonl", *rows), log, tmp_path / "bad.jsonl")
    before = log.counts()
    second = import_log(jsonl(tmp_path / "b.jsonl", *reversed(rows)), log, tmp_path / "bad.jsonl")
    assert (first.impressions, first.events, first.without_feedback, first.quarantined) == (4, 3, 2, 0)
    assert (second.impressions, second.duplicate_impressions, second.events, second.duplicate_events) == (0, 5, 0, 3)
    assert (log.counts().impressions, log.counts().events) == (before.impressions, before.events) == (4, 3)
    check_sums(first)
    check_sums(second)


def test_many_rows_are_known_again_and_the_collector_is_left_as_it_was(log: FeedbackLog, tmp_path: Path):
    rows = [{**GOOD, "id": f"i{number}", "signal": "upvote", "time": 5.0} for number in range(1_001)]
    usual = gc.get_threshold()
    first = import_log(jsonl(tmp_path / "in.jsonl", *rows), log, tmp_path / "bad.jsonl")
    changed = jsonl(tmp_path / "again.jsonl", *rows[:-1], {**rows[-1], "response": "other"})
    again = import_log(changed, log, tmp_path / "bad.jsonl")
    assert (first.impressions, first.events) == (1_001, 1_001)
    assert (again.impressions, again.duplicate_impressions, again.duplicate_events, again.quarantined) == (0, 1_000, 1_000, 1)
    with pytest.raises(SourceError):
        import_log(jsonl(tmp_path / "none.jsonl", "{"), log, tmp_path / "bad.jsonl")
    assert gc.get_threshold() == usual


def test_conflicting_row_is_quarantined_alone(log: FeedbackLog, tmp_path: Path):
    rows = [{**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a", "response": "other"}]
    rows += [{**GOOD, "id": "c", "label": 1, "event_id": "e"}, {**GOOD, "id": "d", "label": 0, "event_id": "e"}]
    report = import_log(jsonl(tmp_path / "in.jsonl", *rows), log, tmp_path / "bad.jsonl")
    assert (report.rows, report.impressions, report.events, report.quarantined) == (5, 3, 1, 2)
    check_sums(report)
    entries = quarantined(tmp_path / "bad.jsonl")
    assert [entry["row"] for entry in entries] == [3, 5]
    assert "id 'a' must keep its content, got response=a text of 1 characters then a text of 5 " in entries[0]["reason"]
    assert set(log.snapshot()["impression_id"][:]) == {"a", "b", "c"}


CORRUPTIONS = st.sampled_from([*(bad for bad, _ in BAD_ROWS if not isinstance(bad, str) or len(bad) < 100), b"\x00\xff", "null"])
ROWS = st.builds(
    lambda name, response, label: {"prompt": "p", "response": response, **({"id": name} if name else {}), "label": label},
    st.none() | st.sampled_from(["a", "b"]),
    st.sampled_from(["r", "s"]),
    st.sampled_from([None, 0, 1]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.just(True), ROWS) | st.tuples(st.just(False), CORRUPTIONS), max_size=12), ROWS)
def test_numbers_add_up_and_nothing_is_lost_under_any_corruption(new_log_url: Callable[[], str], rows: list[tuple], first: dict):
    rows = [(True, {**first, "topic": "é"}), *rows]  # which shows that the file is in UTF-8
    with tempfile.TemporaryDirectory() as name, closing(FeedbackLog(new_log_url(), SIGNALS)) as log:
        folder = Path(name)
        report = import_log(jsonl(folder / "in.jsonl", *(row for _, row in rows)), log, folder / "bad.jsonl", limit=LIMIT)
        counts = log.counts()
        refused = [entry["row"] for entry in quarantined(folder / "bad.jsonl")]
    check_sums(report)
    assert sorted(refused) == refusals(rows)
    assert (report.rows, report.quarantined) == (len(rows), len(refused))
    assert (report.impressions, report.events) == (counts.impressions, counts.events)
    assert counts.orphans == 0


def refusals(rows: list[tuple]) -> list[int]:
    """Numbers of the corrupt rows, and of those that give a known id another response."""
    responses: dict[str, str] = {}
    refused = []
    for number, (good, row) in enumerate(rows, 1):
        accepted = good and ("id" not in row or responses.setdefault(row["id"], row["response"]) == row["response"])
        if not accepted:
            refused.append(number)
    return refused


SOURCE_ROWS = [
    {**GOOD, "label": 1},
    {**GOOD, "label": 0},
    {**GOOD, "label": None},
    {"prompt": None, "response": "r", "label": None},
]


def make_source(kind: str, folder: Path) -> str:
    table = pa.Table.from_pylist(SOURCE_ROWS)
    folder.mkdir()
    match kind:
        case "jsonl":
            return jsonl(folder / "in.jsonl", *SOURCE_ROWS)
        case "parquet":
            pq.write_table(table, folder / "in.parquet")
            return str(folder / "in.parquet")
        case "folder of files":
            jsonl(folder / "1.jsonl", *SOURCE_ROWS[:2])
            pq.write_table(table.slice(2), folder / "2.parquet")
        case "save_to_disk":
            Dataset(table).save_to_disk(folder / "d")
            return str(folder / "d")
        case "save_to_disk of splits":
            DatasetDict({"train": Dataset(table), "test": Dataset(table.slice(0, 1))}).save_to_disk(folder / "d")
            return str(folder / "d")
        case "load_dataset":
            Dataset(table).to_csv(str(folder / "train.csv"))
    return str(folder)


KINDS = ["jsonl", "parquet", "folder of files", "save_to_disk", "save_to_disk of splits", "load_dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_records(log: FeedbackLog, tmp_path: Path, monkeypatch, kind: str):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    report = import_log(make_source(kind, tmp_path / "source"), log, tmp_path / "bad.jsonl")
    text = kind == "load_dataset"  # a CSV
    warnings = ("2 labels were text, such as true or 1, and are read as 1 and 0",) if text else ()
    assert report == ImportReport(4, 3, 0, 2, 0, 1, 1, (), warnings=warnings, formats=("native",))
    assert sorted(str(row["label"]) for row in log.snapshot()) == ["0", "1", "None"]


def test_snapshot_can_be_imported_elsewhere(log: FeedbackLog, tmp_path: Path):
    import_log(jsonl(tmp_path / "in.jsonl", *SOURCE_ROWS), log, tmp_path / "bad.jsonl")
    write_snapshot(log.snapshot(), tmp_path / "s.parquet")
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/other.db", SIGNALS)) as other:
        report = import_log(str(tmp_path / "s.parquet"), other, tmp_path / "bad.jsonl")
        assert report.ignored_columns == ("observed",)
        assert other.snapshot().to_list() == log.snapshot().to_list()


def test_source_without_a_good_row_is_refused(log: FeedbackLog, tmp_path: Path):
    source = jsonl(tmp_path / "in.jsonl", "{", "[]")
    with pytest.raises(SourceError, match=r"at least one good row, got 2 bad rows of 2, .*in\.jsonl row 1: row must be JSON"):
        import_log(source, log, tmp_path / "bad.jsonl")
    assert len(quarantined(tmp_path / "bad.jsonl")) == 2
    with pytest.raises(SourceError, match=r"empty\.jsonl must hold rows, got 0"):
        import_log(jsonl(tmp_path / "empty.jsonl"), log, tmp_path / "bad.jsonl")


def test_unreadable_source_is_refused(log: FeedbackLog, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="nowhere/at-all must be a data set on the hub with the split 'train'"):
        import_log("nowhere/at-all", log, tmp_path / "bad.jsonl")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"torn\.parquet must be a readable Parquet file"):
        import_log(str(tmp_path / "torn.parquet"), log, tmp_path / "bad.jsonl")
    (tmp_path / "in.docx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"in\.docx must end in one of"):
        import_log(str(tmp_path / "in.docx"), log, tmp_path / "bad.jsonl")
    Dataset.from_list([GOOD]).save_to_disk(tmp_path / "d")
    DatasetDict({"test": Dataset.from_list([GOOD])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(SourceError, match="with the split 'train'"):
        import_log(str(tmp_path / "splits"), log, tmp_path / "bad.jsonl")


def test_quarantine_never_overwrites_or_joins_its_source(log: FeedbackLog, tmp_path: Path):
    source = jsonl(tmp_path / "in" / "in.jsonl", GOOD)
    for quarantine in (source, tmp_path / "in" / "bad.jsonl"):
        with pytest.raises(SourceError, match="quarantine_path must lie outside the source"):
            import_log(source if quarantine == source else str(tmp_path / "in"), log, quarantine)
    assert json.loads(Path(source).read_text()) == GOOD


def test_prompts_are_read_in_order_from_jsonl_and_parquet(tmp_path: Path):
    rows = [{"prompt": "b"}, {"prompt": "a", "more": 1}, {"prompt": [{"role": "user", "content": "c"}]}]
    source = jsonl(tmp_path / "p.jsonl", *rows)
    assert read_prompts(source) == [(source, number, Conversation.user(text)) for number, text in enumerate("bac", 1)]
    pq.write_table(pa.table({"prompt": ["b", "a"]}), tmp_path / "p.parquet")
    assert [row.prompt for row in read_prompts(str(tmp_path / "p.parquet"))] == [Conversation.user(text) for text in "ba"]


def test_faulty_prompts_are_listed_by_row(tmp_path: Path):
    source = jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"text": "b"}, "", "{", {"prompt": " "})
    with pytest.raises(
        SourceError, match=r"(?s)got 3 faulty rows:.*row 2: prompt must.*row 4: row must be JSON.*row 5: prompt must"
    ):
        read_prompts(source)
    with pytest.raises(SourceError, match="must hold prompts, got 0 rows"):
        read_prompts(jsonl(tmp_path / "none.jsonl"))
