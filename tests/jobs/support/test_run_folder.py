"""Rollouts are written beside the update, and errors reach the user; what no checkpoint needs any more is deleted."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest

from causalrm_ray.checkpoint import write_json
from causalrm_ray.config.options import load_config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rollouts import kept_steps, read_rollout, rollout_path
from causalrm_ray.types import Completion, Impression, Prompt, Scored
from jobs.support.run_folder import RolloutWriter, Run

SCORED = [Scored(Completion(Prompt("a", Conversation.user("hi"), (1, 2)), "yes", (3,), (-0.5,), "stop", 1), 0.25, 1)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(load_config(None, [f"run.dir={tmp_path}", "run.name=mine"]))


def test_writing_a_rollout_does_not_delay_its_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    go, written = threading.Event(), []
    monkeypatch.setattr("jobs.support.run_folder.write_rollout", lambda scored, path: (go.wait(30), written.append(path)))
    with RolloutWriter(run) as rollouts:
        rollouts.write(0, SCORED)
        assert written == []  # here the learner updates
        go.set()
        rollouts.wait()
        assert written == [rollout_path(run.path, 0)]


def test_an_error_in_writing_ends_the_run_at_the_next_step_or_the_end(run: Run) -> None:
    (run.path / "rollouts").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError, match="rollouts"), RolloutWriter(run) as rollouts:
        rollouts.write(0, SCORED)
    rollouts = RolloutWriter(run)
    rollouts.write(0, SCORED)
    with pytest.raises(OSError, match="rollouts"):
        rollouts.write(1, SCORED)


def test_rollouts_since_the_previous_checkpoint_are_kept(run: Run) -> None:
    with RolloutWriter(run) as rollouts:
        for step in range(5):
            rollouts.write(step, SCORED)
            if step in (1, 3):
                rollouts.wait()
                rollouts.forget(checkpoint=step + 1)
    assert kept_steps(run.path) == [2, 3, 4]
    assert read_rollout(rollout_path(run.path, 4)) == SCORED


def refit(folder: Path, log: FeedbackLog, name: str) -> None:
    """What a refit leaves."""
    log.append([Impression(name, Conversation.user("hi"), "yes", 0, 1.0)])
    log.seal(folder, name).with_suffix(".labels.safetensors").touch()
    for kind in ("propensity", "reward"):
        (folder / kind / name).mkdir(parents=True)


def save(folder: Path, step: int, reward: str, propensity: str) -> None:
    """A checkpoint in which these refits' models serve."""
    serving = {"reward": {"folder": f"reward/{reward}/auto"}, "propensity": f"propensity/{propensity}"}
    write_json(folder / "checkpoints" / f"step-{step}" / "facts.json", {"serving": serving})


def names(folder: Path, kind: str) -> list[str]:
    return sorted(path.name.removesuffix(".parquet") for path in (folder / kind).iterdir() if path.suffix != ".safetensors")


@pytest.mark.parametrize("keep", ["1", "2", "null"])
def test_what_no_checkpoint_needs_is_deleted(keep: str, tmp_path: Path) -> None:
    run = Run(load_config(None, [f"run.dir={tmp_path}", "run.name=mine", f"loop.keep={keep}"]))
    with closing(FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {})) as log:
        for name in ("log", "step-2", "step-4", "step-6", "step-10"):
            refit(run.path, log, name)
    save(run.path, 2, "log", "log")
    save(run.path, 4, "step-2", "step-2")
    save(run.path, 8, "step-2", "step-6")  # the model of step-6 was refused
    save(run.path, 10, "step-6", "step-6")
    run.retire(10)
    checkpoints = {"1": ["step-10"], "2": ["step-10", "step-8"], "null": ["step-10", "step-2", "step-4", "step-8"]}
    assert names(run.path, "checkpoints") == checkpoints[keep]
    refits = {"1": ["log", "step-10", "step-6"], "2": ["log", "step-10", "step-2", "step-6"]}
    kept = refits.get(keep, ["log", "step-10", "step-2", "step-4", "step-6"])
    for kind in ("propensity", "reward", "snapshots"):
        assert names(run.path, kind) == kept
    assert len(list((run.path / "segments").iterdir())) == len(kept)  # each of them made its own of so few rows
    assert len(list((run.path / "snapshots").glob("*.safetensors"))) == len(kept)


def test_a_damaged_checkpoint_and_those_ahead_cost_none_that_is_good(tmp_path: Path) -> None:
    run = Run(load_config(None, [f"run.dir={tmp_path}", "run.name=mine", "loop.keep=2"]))
    with closing(FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {})) as log:
        refit(run.path, log, "log")
    for step in (8, 9):
        save(run.path, step, "log", "log")
    for step in (7, 10):
        (run.path / "checkpoints" / f"step-{step}").mkdir()
    (run.path / "checkpoints" / "step-8" / "facts.json").write_text("{", encoding="utf-8")
    run.retire(9)
    assert names(run.path, "checkpoints") == ["step-10", "step-8", "step-9"]


def test_a_new_run_begins_without_the_segments_of_a_log_before(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=mine"])
    with closing(FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {})) as log:
        refit(config.run.path, log, "log")
    run = Run(config)
    assert not (run.path / "segments").exists()
    assert not (run.path / "snapshots").exists()
