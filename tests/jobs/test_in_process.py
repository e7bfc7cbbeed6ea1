"""The main job without Ray, and its learner again, alone, on the rollouts that the run kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from causalrm_ray.config.options import load_config
from causalrm_ray.data.rollouts import kept_steps, read_rollout, rollout_path, write_rollout
from causalrm_ray.errors import ConfigError

ALONE = ["cluster.address=in-process", "rollout.engine=hf", "rollout.generators=1", "learner.ranks=1", "reward.workers=0"]
SMALL = ["world.impressions=600", "reward.method=naive", "reward.compare=[]", "rollout.prompts_per_step=8"]
STEPS = ["loop.steps=3", "loop.checkpoint_every=2", "loop.evaluation_prompts=20", "reward.refit_every=2"]


def job(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", name, f"run.dir={folder}", "run.name=alone", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = job("train-policy", folder, *ALONE, *SMALL, *STEPS)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_without_ray_leaves_what_any_run_does(folder: Path) -> None:
    summary = json.loads((folder / "alone" / "summary.json").read_text(encoding="utf-8"))
    assert summary["policy_version"] == 3
    assert summary["feedback"]["impressions"] == 600 + 3 * 16
    assert (folder / "alone" / "checkpoints" / "step-3" / "policy" / "config.json").exists()
    assert kept_steps(folder / "alone") == [2]  # those since the checkpoint before the newest


def test_replay_repeats_the_learner_s_figures_and_says_where_they_differ(folder: Path) -> None:
    done = job("replay", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grad_norm" in done.stdout
    path = rollout_path(folder / "alone", 2)
    first, *others = read_rollout(path)
    write_rollout([type(first)(first.completion, first.reward + 5, first.reward_version), *others], path)
    assert job("replay", folder).returncode == 1


def test_replay_without_a_run_or_rollouts_is_refused(tmp_path: Path) -> None:
    done = job("replay", tmp_path)
    assert done.returncode == 2
    assert "holds no run" in done.stderr


def test_one_process_cannot_hold_what_needs_several() -> None:
    with pytest.raises(
        ConfigError, match=r"in-process needs a rollout\.engine that .*, such as hf, got vllm; .*learner\.ranks=1, got 2"
    ):
        load_config(None, ["cluster.address=in-process", "rollout.generators=1", "reward.workers=0"])
    load_config(None, ALONE)
