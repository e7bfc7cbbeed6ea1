"""check-log: its figures by value, on conversations with late votes, one flooding user, and rows that are no good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows(bad: int) -> list[dict[str, Any]]:
    """60 impressions of 20 conversations with 3 users' turns at most; 20 votes, 12 of them of one user, and `bad` lost ones."""
    found: list[dict[str, Any]] = []
    for number in range(60):
        talk = [turn("user", f"question {number // 3}"), turn("assistant", "so"), turn("user", "why?"), turn("assistant", "so")]
        row = {
            "id": f"i{number}",
            "prompt": [*talk[: 2 * (number % 3)], turn("user", "and then?")],
            "response": f"answer {number}",
        }
        row |= {
            "conversation_id": f"c{number // 3}",
            "user": "loud" if number < 12 else f"u{number % 5}",
            "mood": "fine",
            "[bold]": 1,
        }
        if number < 20:
            row["signal"] = ("upvote", "downvote")[number % 2]
        found.append(row)
    events = [{"impression_id": "i0", "signal": "downvote", "time": 5}, {"impression_id": "i59", "label": 1, "time": 5}]
    return [*found, *events, *({"prompt": "p", "response": "", "signal": "upvote"} for _ in range(bad))]


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: int, *more: str) -> tuple[int, str]:
    source = tmp_path / "log.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(bad)))
    status = main(["check-log", f"feedback.source={source}", *more])
    return status, capsys.readouterr().out


def test_figures_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = check(tmp_path, capsys, 1, "json=true")
    found = json.loads(out)
    assert status == 0
    assert (found["format"], found["rows"], found["impressions"], found["events"]) == ("native", 63, 60, 22)
    assert (found["observed"], found["liked"], found["quarantined"]) == (21, 10, 1)
    assert (found["conversations"], found["distinct_prompts"], found["turns"], found["max_turns"]) == (20, 41, 120, 3)
    assert (found["users"], found["ignored_columns"]) == (6, ["[bold]", "mood"])
    assert found["reactions"] == {"downvote (disliked)": 11, "liked (liked)": 1, "upvote (liked)": 9}
    assert found["quarantined_by_reason"] == {"response must not be empty": 1}
    assert found["quarantined_reactions"] == {"upvote": 1}
    assert found["lost"] == pytest.approx(1 / 22)
    assert "user 'loud' has 12 of 21 reactions, 57%" in found["warnings"]
    assert found["enough"] is True


def test_too_many_lost_reactions_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = check(tmp_path, capsys, 2)
    assert status == 1
    assert "reactions lost" in out
    assert "8.7%" in out
    assert '"content":"and then?"' in out
    assert "[bold], mood" in out  # as it is named, not as markup


def test_a_log_that_no_fit_can_use_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "silent.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(0)[20:60]))
    assert main(["check-log", f"feedback.source={source}", "json=true"]) == 1
    assert "feedback log must hold feedback, got 0 observed of 40 rows" in json.loads(capsys.readouterr().out)["enough"]
