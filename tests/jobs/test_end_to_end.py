"""The main job for real: vLLM generators, two DeepSpeed ranks, two Ray Train workers, a log in SQLite; broken off and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from causalrm_ray import RewardModel
from jobs.support.run_folder import TIMINGS, Run

OPTIONS = [
    "world.impressions=600",
    "reward.epochs=2",
    "reward.refit_every=3",
    "reward.compare=[]",
    "rollout.prompts_per_step=16",
    "loop.steps=6",
    "loop.checkpoint_every=2",
    "loop.evaluation_prompts=40",
]


def command(folder: Path, name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "jobs", "train-policy", *OPTIONS, f"run.dir={folder}", f"run.name={name}", *options]


def metrics(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in Run.read_metrics(run)]


@contextmanager
def stopped(process: subprocess.Popen) -> Iterator[None]:
    """Stop the driver and all that it started, at once: what is on the disk then is all that kill -9 would have left."""
    driver = psutil.Process(process.pid)
    everyone: set[psutil.Process] = set()
    while started := {driver, *driver.children(recursive=True)} - everyone:
        for one in started:
            with suppress(psutil.NoSuchProcess):  # it ended by itself
                one.send_signal(signal.SIGSTOP)
        everyone |= started
    try:
        yield
    finally:
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one left alone, and what it had written in the middle of a step, past a refit, elsewhere and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    whole = subprocess.Popen(command(folder / "whole", "run"), stdout=subprocess.PIPE, text=True)
    assert whole.stdout is not None
    for line in whole.stdout:
        if line.strip().endswith("checkpoint step-4"):
            with stopped(whole):
                shutil.copytree(folder / "whole", folder / "killed")
    assert whole.wait() == 0
    assert not (folder / "killed" / "run" / "summary.json").exists()
    resume = [*command(folder, "run")[:4], f"run.dir={folder / 'killed'}", "run.name=run", "resume=true"]
    subprocess.run(resume, check=True, timeout=600)
    return folder


@pytest.mark.timeout(1800)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(runs: Path) -> None:
    whole, resumed = runs / "whole" / "run", runs / "killed" / "run"
    assert metrics(resumed) == metrics(whole)
    weights = [load_file(run / "checkpoints" / "step-6" / "policy" / "model.safetensors") for run in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.timeout(1800)
def test_the_summary_holds_the_whole_story(runs: Path) -> None:
    summary = json.loads((runs / "killed" / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 6
    assert summary["policy_version"] == 6
    assert summary["feedback"]["lost"] == summary["feedback"]["duplicated"] == 0
    assert summary["feedback"]["impressions"] == 600 + 6 * 32
    assert (
        summary["logprob_mismatch"]["max_abs"] <= 1e-4
    )  # fp32 engines of one model differ by rounding only: 2.4e-6 was measured
    assert summary["weight_sync"]["checksum_ok"]
    assert [summary["engines"][role]["name"] for role in ("rollout", "learner", "reward")] == ["vllm", "deepspeed", "ray-train"]
    assert (runs / "killed" / "run" / "report.html").stat().st_size > 50_000


@pytest.mark.timeout(1800)
def test_policy_and_reward_model_load_with_stock_transformers(runs: Path) -> None:
    run = runs / "whole" / "run"
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-6" / "policy")
    reward = json.loads((run / "summary.json").read_text(encoding="utf-8"))["reward_fit"]["folders"]["auto"]
    assert 0 < RewardModel.load(run / reward).score("how do i sell maps?", "you can begin with good maps.") < 1


@pytest.mark.timeout(1800)
def test_asynchronous_steps_of_learning_rate_zero_drift_nowhere(tmp_path: Path) -> None:
    """The log-probabilities of an engine that gets weights while it writes stay the learner's; every answer is shown."""
    still = ["learner.staleness=1", "learner.lr=0", "learner.critic_lr=0", "rollout.generators=1", "learner.ranks=1"]
    plain = [
        "world.impressions=600",
        "reward.method=naive",
        "reward.compare=[oracle]",
        "reward.rho=[0.2,0.1]",  # of so few reactions they cannot always be estimated
        "reward.workers=0",
        "reward.refit_every=0",
        "loop.steps=20",
        "loop.checkpoint_every=0",
    ]
    subprocess.run(command(tmp_path, "run", *still, *plain), check=True, timeout=600)
    rows = metrics(tmp_path / "run")
    assert max(row["logprob_mismatch_mean_abs"] for row in rows) <= 1e-5
    assert max(abs(row["kl"]) for row in rows) <= 1e-4  # nats per answer
    assert rows[0]["staleness"] == 0.0
    assert all(0 < row["staleness"] <= 1 for row in rows[1:])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["policy_version"], summary["feedback"]["impressions"]) == (20, 600 + 20 * 32)
