"""The planner's job: a plan from numbers alone, with and without measured rates, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from causalrm_ray.config.options import load_tree, options
from causalrm_ray.config.plan import PlanConfig
from jobs.__main__ import main


def plan(folder: Path, *options: str) -> dict:
    assert main(["plan", f"run.dir={folder}", f"run.cache={folder / 'cache'}", *options]) == 0
    return json.loads((folder / "plan" / "plan.json").read_text(encoding="utf-8"))


def perf_json(path: Path, **seconds: float) -> Path:
    figures = [
        {"name": name, "case": "26M 32x64", "value": 1.0, "details": {"ours_s": value, "tokens": 32 * 64.0}}
        for name, value in seconds.items()
    ]
    path.write_text(json.dumps({"cores": 2, "figures": figures}), encoding="utf-8")
    return path


def test_a_plan_says_bytes_seconds_dollars_and_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(tmp_path, "hardware.price=2.0", "steps=10", "log_rows=1000")
    assert set(found["bytes"]) >= {"generator-0", "generator-2", "learner-3", "reward", "propensity"}
    assert found["fits"] == ""
    assert "scoring" not in found["step"]["wall_s"], "3 + 4 + 1 GPUs: the reward model scores while others generate"
    assert found["step"]["seconds"] == pytest.approx(sum(found["step"]["wall_s"].values()))
    assert sum(found["run_s"].values()) == pytest.approx(10 * found["step"]["seconds"] + sum(found["fit_s"].values()))
    assert found["dollars"] == pytest.approx(sum(found["run_s"].values()) / 3600 * 8 * 2.0)
    assert (tmp_path / "plan" / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert f"slowest: {found['bottleneck']['phase']}" in capsys.readouterr().out


def test_a_log_of_a_billion_events_is_what_costs_and_a_sample_of_it_does_not(tmp_path: Path) -> None:
    whole = plan(tmp_path / "a", "log_events=1000000000")
    assert whole["bottleneck"]["phase"] in ("features", "heads")
    assert "log_rows" in whole["bottleneck"]["change"]
    sample = plan(tmp_path / "b", "log_events=1000000000", "log_rows=1000000")
    assert sample["fit_s"]["features"] == pytest.approx(whole["fit_s"]["features"] / 1000)


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "raise learner.zero_stage" in plan(tmp_path, "kind=L4")["fits"]
    assert "does not fit: " in capsys.readouterr().out


def test_measured_rates_replace_what_is_assumed_and_are_checked_on_the_measured_steps(tmp_path: Path) -> None:
    measured = perf_json(tmp_path / "perf.json", rollout=1.5, learner=4.0, trl=5.0)
    found = plan(tmp_path, f"measured={measured}")
    [line] = found["checked"]
    sync = line["predicted_s"] - 1.5 - 4.0
    assert 0 < sync == pytest.approx(26e6 * 4 / 2e9, rel=0.05)
    assert line["measured_s"] == 5.0
    assert found["step"]["seconds"] > 100 * plan(tmp_path / "b")["step"]["seconds"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["measured=nowhere.json"], "nowhere.json must be"),
        (["hardware.gpus=2"], "learner.ranks"),
        (["samples=1"], "samples must be at least 2"),
        (["log_rows=2000000"], "log_rows must be at most log_events=1000000"),
        (["shape.parameters=1e6"], "shape.parameters must exceed"),
        (["model=no/such/model/here"], "model no/such/model/here must be"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    options: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"run.dir={tmp_path}", f"run.cache={tmp_path / 'cache'}", *options]) == 2
    assert part in " ".join(capsys.readouterr().err.split())


def test_one_figure_of_a_shape_leaves_the_others_at_the_defaults_that_help_shows() -> None:
    shape = load_tree(PlanConfig, None, ["reward_shape.layers=20"]).reward_shape
    assert (shape.parameters, shape.layers, shape.tied) == (1.24e9, 20, True)
    shown = {option.key: option.default for option in options(PlanConfig)}
    assert (float(shown["reward_shape.parameters"]), float(shown["shape.parameters"])) == (1.24e9, 8e9)
