"""Events as they happen: several on an impression, late, changed, withdrawn, before it, graded, in rows of their own."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.config.options import validate
from causalrm_ray.config.train import Thresholds
from causalrm_ray.data.log.import_log import import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.errors import ConfigError, InputError

SIGNALS = {"upvote": 1, "copy": 1, "downvote": 0, "stars": Thresholds(low=2, high=4)}
VOTES_FIRST = [["upvote", "downvote"]]


def labels(folder: Path, *files: list[dict[str, Any]], order: Any = VOTES_FIRST) -> dict[str, int | None]:
    """The label of each impression, of files that are imported in turn; importing them again must change nothing."""
    with closing(FeedbackLog(f"sqlite:///{folder}/log.db", SIGNALS, order)) as log:
        for _ in range(2):
            for number, rows in enumerate(files):
                source = folder / f"{number}.jsonl"
                source.write_text("".join(json.dumps(row) + "\n" for row in rows))
                assert import_log(str(source), log, folder / "bad.jsonl").quarantined == 0
            found = {row["impression_id"]: row["label"] for row in log.snapshot()}
            counts = log.counts()
        assert counts.redelivered == counts.impressions + counts.events
    return found


def shown(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "p", "response": "r", "time": 0, **more}


def did(name: str, signal: str, time: float, **more: Any) -> dict[str, Any]:
    return {"impression_id": name, "signal": signal, "time": time, **more}


def test_the_newest_event_decides_and_a_vote_outranks_a_copy(tmp_path: Path) -> None:
    rows = [shown(name) for name in "abc"]
    events = [
        *[did("a", "upvote", 1), did("a", "downvote", 2)],
        *[did("b", "downvote", 1), did("b", "copy", 2)],
        *[did("c", "copy", 2), did("c", "downvote", 1)],
    ]
    (tmp_path / "x").mkdir()
    assert labels(tmp_path, rows, events) == {"a": 0, "b": 0, "c": 0}
    assert labels(tmp_path / "x", rows, events, order=()) == {"a": 0, "b": 1, "c": 1}


def test_events_come_before_their_impression_in_its_row_and_in_a_list(tmp_path: Path) -> None:
    later = [{"signal": "upvote", "time": 5}, {"signal": "downvote", "time": 4}]
    rows = [shown("a", signal="copy", events=later), shown("b"), shown("c", label=1, events=[{"label": 0, "time": 1}])]
    assert labels(tmp_path, [did("b", "downvote", 1)], rows) == {"a": 1, "b": 0, "c": 0}


def test_a_row_an_event_repeats_the_answer_at_the_times_of_the_events(tmp_path: Path) -> None:
    copied, disliked = shown("a", signal="copy", time=5), shown("a", signal="downvote", time=25)
    source, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [shown("a"), copied, disliked, shown("b")]))
    other.write_text(json.dumps({**disliked, "response": "another"}) + "\n" + json.dumps(shown("b", time=9)) + "\n")
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/log.db", SIGNALS)) as log:
        report = import_log(str(source), log, tmp_path / "bad.jsonl")
        assert (report.impressions, report.duplicate_impressions, report.events, report.quarantined) == (2, 2, 2, 0)
        assert import_log(str(source), log, tmp_path / "bad.jsonl").duplicate_impressions == 4
        found = {row["impression_id"]: (row["label"], row["time"]) for row in log.snapshot()}
        assert found == {"a": (0, 0.0), "b": (None, 0.0)}  # the time of the first row
        with pytest.raises(InputError, match="2 bad rows of 2"):  # another answer, and another time without an event
            import_log(str(other), log, tmp_path / "bad.jsonl")


def test_a_withdrawn_vote_counts_no_more_in_whatever_order_it_comes(tmp_path: Path) -> None:
    vote = did("a", "downvote", 1, event_id="e1")
    withdrawal = {"impression_id": "a", "retracts": "e1", "time": 2}
    assert labels(tmp_path, [withdrawal], [shown("a", signal="copy")], [vote]) == {"a": 1}


def test_a_graded_signal_means_what_its_thresholds_say(tmp_path: Path) -> None:
    rows = [shown(str(stars), signal="stars", value=stars) for stars in range(6)]
    assert labels(tmp_path, rows) == {"0": 0, "1": 0, "2": 0, "3": None, "4": 1, "5": 1}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"signal": "stars"}, "value must be given with the signal 'stars', whose value says what it means"),
        ({"signal": "stars", "value": 4, "label": 1}, "label must not be given with the signal 'stars'"),
        ({"events": [{"time": 3}]}, "an event must have a signal, a label or the id of an event that it retracts"),
        ({"events": "upvote"}, "events must be a list of JSON objects"),
    ],
)
def test_an_event_that_says_nothing_is_refused(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(shown("good")) + "\n" + json.dumps(shown("bad", **row)) + "\n")
    with closing(FeedbackLog(f"sqlite:///{tmp_path}/log.db", SIGNALS)) as log:
        assert import_log(str(source), log, tmp_path / "bad.jsonl").quarantined == 1
    assert fault in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]


@pytest.mark.parametrize(
    ("feedback", "fault"),
    [
        ({"signals": {"stars": {"low": 4, "high": 2}}}, "low must be below high, got 4.0 >= 2.0"),
        ({"signals": {"stars": {}}}, "must have a threshold, low or high"),
        ({"order": [["upvote"], ["applause"]]}, "feedback.order must name signals of feedback.signals, got 'applause'"),
        ({"order": [["upvote"], ["upvote"]]}, "feedback.order must name signals of feedback.signals, got 'upvote'"),
    ],
)
def test_rules_that_make_no_sense_are_refused(feedback: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        validate({"feedback": feedback})


def test_thresholds_are_set_as_options() -> None:
    feedback = validate({"feedback": {"signals": {"stars": {"low": 2, "high": 4}, "click": None}, "order": [["stars"]]}}).feedback
    assert feedback.signals["stars"] == Thresholds(low=2, high=4)
    assert feedback.signals["click"] is None
    assert feedback.model_dump(mode="json")["signals"]["stars"] == {"low": 2.0, "high": 4.0}
