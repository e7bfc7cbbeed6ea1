"""What a job prints of states that are computed."""

from __future__ import annotations

import re

import pytest

from actors.features.states import StatesDone
from jobs.support import progress
from jobs.support.progress import Progress


def test_states_are_counted_ten_times_with_a_rate_since_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, *(float(second) for second in range(1, 1000))])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    bar = Progress()
    for rows in range(0, 1001, 10):
        bar.states(StatesDone(rows, 1000, 40 * rows))
    shown = capsys.readouterr().out
    assert "computing states of 1000 answers" in shown
    lines = [line for line in shown.splitlines() if "/1000" in line]
    assert len(lines) == 10
    rates = [int(found) for found in re.findall(r"(\d+) tokens/s", shown)]
    assert len(rates) == 10
    assert all(0 < rate <= 400 for rate in rates), "no more than the 400 tokens between two readings of the clock"


def test_nothing_is_said_where_no_states_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().states(StatesDone(0, 0, 0))
    assert capsys.readouterr().out == ""
