"""The run's log: a line of JSON for each event, with the run, the step and the role; and the names that dashboards rely on."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from actors.cluster.telemetry import LOGGER, METRICS, event, exported, record
from causalrm_ray.config.base import RunFolder
from causalrm_ray.errors import InputError
from jobs.support.log import FILE, mask_secrets, run_log
from jobs.support.progress import Progress

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"


def lines(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.path / FILE).read_text(encoding="utf-8").splitlines()]


def test_every_event_is_a_line_that_says_where_it_belongs(tmp_path: Path) -> None:
    run = RunFolder(name="mine", dir=tmp_path)
    progress = Progress()
    with run_log(run):
        progress.phase("starting roles")
        for step in progress.steps(3, 5):
            event("sync", "learner", version=step, seconds=0.5)
            progress.step(step, {"reward": 0.25})
        event("warning", level=logging.WARNING, text="no overlap")
    event("sync", "learner", version=9)
    found = lines(run)
    assert [(line["event"], line["step"], line["role"]) for line in found] == [
        ("phase", None, "driver"),
        ("phase", None, "driver"),
        *(row for step in (3, 4) for row in (("sync", step, "learner"), ("step", step, "driver"))),
        ("warning", None, "driver"),
    ]
    assert {line["run"] for line in found} == {"mine"}
    assert [line["level"] for line in found] == ["info"] * 6 + ["warning"]
    assert found[2]["fields"] == {"version": 3, "seconds": 0.5}
    assert found[3]["fields"] == {"figures": {"reward": 0.25}}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) for line in found)


def test_what_ends_a_run_is_its_last_line_and_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    run = RunFolder(name="mine", dir=tmp_path)
    for text in ("first", "second"):
        with pytest.raises(RuntimeError, match=text), run_log(run):
            raise RuntimeError(text)
    assert [line["fields"] for line in lines(run)] == [{"kind": "RuntimeError", "error": text} for text in ("first", "second")]
    assert {line["level"] for line in lines(run)} == {"error"}


def test_a_refused_command_leaves_no_log(tmp_path: Path) -> None:
    run = RunFolder(name="mine", dir=tmp_path)
    with pytest.raises(InputError), run_log(run):
        raise InputError("no such prompts")
    assert not run.path.exists()
    assert logging.getLogger(LOGGER).handlers[1:] == []


def test_the_dashboard_asks_for_the_metrics_that_there_are_and_for_all_of_them() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"ray_causalrm_\w+", expression)}
    known = {name: exported(name) for name in METRICS}
    assert names <= set().union(*known.values())
    assert [name for name, shown in known.items() if not shown & names] == []
    assert all('run=~"$run"' in expression for expression in asked)


def test_a_metric_that_is_not_listed_is_refused() -> None:
    with pytest.raises(KeyError, match="tokens_written"):
        record("tokens_written", "generator-0", 1)


def test_secrets_never_reach_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(name="mine", dir=tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "no answer from https://me:pass-word@host/api with key 0123456789abcdef"
    with pytest.raises(RuntimeError, match="no answer"), run_log(run):
        raise RuntimeError(text)
    (line,) = lines(run)
    assert line["fields"]["error"] == "no answer from https://***@host/api with key ***"


def test_a_secret_is_masked_whatever_json_would_escape_and_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", 'ab"cd\\efégh')
    monkeypatch.setenv("SOME_TOKEN", "12345678")
    tree = {"url": 'db ab"cd\\efégh', "seed": 12345678, "parts": ["x", None, True, Path("12345678/y")]}
    assert mask_secrets(tree) == {"url": "db ***", "seed": 12345678, "parts": ["x", None, True, "***/y"]}
