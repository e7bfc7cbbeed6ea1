"""A feedback format of another package: named by its import path, it imports a log like ours does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.config.train import Config, Thresholds
from causalrm_ray.data.log.import_log import ImportReport, import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.sources import SourceError
from causalrm_ray.errors import InputError
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer
from jobs.support.feedback import import_feedback

THEIRS = """
from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.rows import RowError

class Conversations:
    '''Turns of a user and an assistant one after the other; `thumbs` holds the place and the label of each answer's vote.'''

    columns = frozenset({"turns", "thumbs", "trace"})

    def read(self, fields):
        turns, thumbs = fields.get("turns", []), dict(fields.get("thumbs", []))
        if len(turns) % 2:
            raise RowError(f"turns must come in pairs, got {len(turns)}")
        for place in range(0, len(turns), 2):
            name = f"{fields['trace']}/{place // 2}"
            votes = [LoggedEvent(label=thumbs[place // 2])] if place // 2 in thumbs else []
            yield LoggedImpression(turns[place], turns[place + 1], id=name, events=votes)

class Joined:
    '''Answers in some rows, votes in others; both are joined at the end.'''

    columns = frozenset({"trace", "turns", "vote"})

    def __init__(self):
        self.turns, self.votes = {}, {}

    def read(self, fields):
        (self.turns if "turns" in fields else self.votes)[fields["trace"]] = fields
        return []

    def finish(self):
        for name, fields in self.turns.items():
            votes = [LoggedEvent(label=self.votes[name]["vote"])] if name in self.votes else []
            yield LoggedImpression(fields["turns"][0], fields["turns"][1], events=votes)
        for name in self.votes.keys() - self.turns.keys():
            yield RowError(f"trace must be one of an answer, got {name!r}")

class Scored:
    '''Scores by name: true, false, or a number that only feedback.signals can give a meaning.'''

    columns = frozenset({"answer", "scores"})

    def __init__(self):
        self.ignored = {"comment": 2}

    def read(self, fields):
        scores = [
            LoggedEvent(score=name, label=float(value) if isinstance(value, bool) else None, value=float(value))
            for name, value in fields.get("scores", {}).items()
        ]
        yield LoggedImpression("hi", fields["answer"], id=fields["answer"], events=scores)

    def warnings(self):
        yield "half of the log is missing"

class NoFormat:
    pass
"""
ROWS = [
    {"trace": "a", "turns": ["hi", "hello", "why?", "because"], "thumbs": [[0, 1]], "cost": 3},
    {"trace": "b", "turns": ["hi", "go away"], "thumbs": [[0, 0]]},
    {"trace": "c", "turns": ["hi"]},
    {"trace": "d", "turns": []},
    {"trace": "e", "turns": ["hi", "go away"], "thumbs": [[0, [7]]]},
    {"trace": "a", "turns": ["hi", "hello", "why?", "no idea"]},
]
PATH = "their_package:Conversations"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_package.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "in.jsonl")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[FeedbackLog]:
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/log.db", {"upvote": 1})) as log:
        yield log


def labels(log: FeedbackLog) -> dict[str, int | None]:
    return {row["impression_id"]: row["label"] for row in log.snapshot()}


def test_a_format_by_import_path_imports_several_answers_of_a_row(source: str, log: FeedbackLog, tmp_path: Path) -> None:
    report = import_log(source, log, tmp_path / "bad.jsonl", format=PATH)
    assert report == ImportReport(6, 3, 0, 2, 0, 1, 4, ("cost",), formats=(PATH,))
    assert labels(log) == {"a/0": 1, "a/1": None, "b/0": 0}
    refused = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"][:40]) for row in refused] == [
        (3, "turns must come in pairs, got 1"),
        (4, "row must hold an answer that was shown, "),
        (5, "label must be 0 or 1, got a list of 1 it"),
        (6, "impressions: id 'a/1' must keep its cont"),  # the whole row, its first answer too
    ]
    assert import_log(source, log, tmp_path / "bad.jsonl", format=PATH).duplicate_impressions == 3


def test_a_format_may_assemble_answers_over_rows(source: str, log: FeedbackLog, tmp_path: Path) -> None:
    rows = [{"trace": "a", "vote": 1}, {"trace": "a", "turns": ["hi", "hello"]}, {"trace": "b", "turns": ["hi", ""]}]
    rows += [{"trace": "c", "turns": ["why?", "because"]}, {"trace": "z", "vote": 0}]
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = import_log(source, log, tmp_path / "bad.jsonl", format="their_package:Joined")
    assert report == ImportReport(5, 2, 0, 1, 0, 1, 2, (), formats=("their_package:Joined",))
    assert sorted(str(label) for label in labels(log).values()) == ["1", "None"]
    refused = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"].split(": ")[-1]) for row in refused] == [
        (0, "response must not be empty, got ''"),
        (0, "trace must be one of an answer, got 'z'"),
    ]
    assert import_log(source, log, tmp_path / "bad.jsonl", format="their_package:Joined").duplicate_impressions == 2


def scored(source: str, folder: Path, signals: dict[str, Any], **scores: Any) -> tuple[ImportReport, dict[str, int | None]]:
    """The report and labels of an answer with each of `scores`."""
    rows = [{"answer": name, "scores": {name.replace("__", ":"): value}} for name, value in scores.items()]
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"answer": "silent"}]))
    with closing(FeedbackLog(f"sqlite:///{folder}/scored.db", signals)) as log:
        return import_log(source, log, folder / "bad.jsonl", format="their_package:Scored"), labels(log)


def test_a_score_means_what_its_signal_says_else_what_its_label_says(source: str, tmp_path: Path) -> None:
    signals = {"stars": Thresholds(low=2, high=4), "copy": 1, "report": 0, "judge": None, "tone:rude": 0}
    scores = {"thumb": True, "down": False, "stars": 5, "copy": True, "report": True, "judge": 0.3, "tone__rude": 1}
    report, found = scored(source, tmp_path, signals, **scores)
    likes = {"thumb": 1, "down": 0, "stars": 1, "copy": 1, "report": 0, "judge": None, "tone__rude": 0, "silent": None}
    assert found == likes
    assert (report.events, report.without_feedback, report.ignored) == (6, 2, {"comment": 2, "signal judge": 1})
    assert report.warnings[0] == "half of the log is missing"
    assert "the scores thumb (1) and down (1)" in report.warnings[1]


def test_a_copy_that_is_false_is_no_feedback_and_a_score_that_is_left_out_leaves_its_categories_out(
    source: str, tmp_path: Path
) -> None:
    report, found = scored(source, tmp_path, {"copy": 1, "tone": None}, copy=False, tone__rude=1)
    assert found == {"copy": None, "tone__rude": None, "silent": None}
    assert report.ignored == {"comment": 2, "signal copy": 1, "signal tone:rude": 1}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            {"quality": 0.7},
            r"the score 'quality', .* 0\.7, .* feedback\.signals\.quality='{low: LOW, high: HIGH}' .*=null leaves",
        ),
        ({"tone__rude": 1}, r"the score 'tone:rude', .* feedback\.signals\.tone:rude=1 reads it as liked, =0 as disliked, =null"),
    ],
)
def test_a_score_without_a_meaning_refuses_the_source(source: str, tmp_path: Path, scores: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        scored(source, tmp_path, {}, **scores)


def test_a_job_imports_in_the_format_of_its_configuration(source: str, tmp_path: Path) -> None:
    sections = {"run": {"dir": str(tmp_path), "name": "own"}, "feedback": {"source": source, "format": PATH}}
    config = Config.model_validate({**sections, "world": {"users": "none"}})
    report = import_feedback(config, train_tokenizer(train_prompts()[:100], PretrainSettings()))
    assert report is not None
    assert (report["impressions"], report["events"], report["quarantined"]) == (3, 2, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nativ", "feedback.format: must be one of native, .*did you mean 'native'"),
        ("no_such_package:Format", "feedback.format: .* cannot be imported"),
        ("their_package:NoFormat", "feedback format 'their_package:NoFormat' must have the attributes columns, read"),
    ],
)
def test_what_is_no_format_is_refused_by_name(source: str, log: FeedbackLog, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_log(source, log, tmp_path / "bad.jsonl", format=name)


def test_a_fault_in_a_format_names_the_row(source: str, log: FeedbackLog, tmp_path: Path) -> None:
    Path(source).write_text('{"turns": ["hi", "hello"]}\n')
    with pytest.raises(KeyError) as caught:
        import_log(source, log, tmp_path / "bad.jsonl", format=PATH)
    assert caught.value.__notes__ == [f"in {source} row 1, read as Conversations"]
