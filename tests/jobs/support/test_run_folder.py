"""Rollouts are written beside the update: nothing waits but a checkpoint, and an error reaches the user."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from causalrm_ray.config.options import load_config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.rollouts import kept_steps, read_rollout, rollout_path
from causalrm_ray.types import Completion, Prompt, Scored
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
