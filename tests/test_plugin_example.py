"""The example of CONTRIBUTING: another package, installed beside this one, adds one of each kind, and jobs run with all five."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from causalrm_ray.registry import ALGORITHMS, ENGINES, ESTIMATORS, FORMATS, TRACKERS

ROOT = Path(__file__).parents[1]
OURS = {ESTIMATORS: "truncated_ips", ALGORITHMS: "plain_rloo", FORMATS: "thumbs", ENGINES: "patient_hf", TRACKERS: "csv"}
ONE_PROCESS = [
    "cluster.address=in-process",
    "rollout.engine=patient_hf",
    "rollout.generators=1",
    "learner.ranks=1",
    "reward.workers=0",
]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "plugin", folder / "source")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(folder / "installed"), str(folder / "source")], check=True, timeout=300)
    return folder / "installed"


def job(plugin: Path, *words: str) -> None:
    path = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_kind_is_found_by_its_entry_point(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(plugin)
    for registry, name in OURS.items():
        assert name in registry.names()
        assert registry.load(registry.check(name)) is not None


def test_jobs_run_with_all_of_them(plugin: Path, tmp_path: Path) -> None:
    """Its format and estimator read and fit a log of thumbs; its algorithm, engine and tracker tune a policy."""
    rng = random.Random(0)
    rows = []
    for number in range(400):
        good = number % 2 == 0
        thumbs = rng.choice(["up" if good else "down", ""])
        answer = "sure, here is a simple plan for lamps." if good else "no."
        rows.append({"question": "how do i clean lamps?", "answer": answer, "ticket": f"t{number}", "thumbs": thumbs})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "how do i clean lamps?"}\n{"prompt": "how do i sell lamps?"}\n', encoding="utf-8"
    )
    log = [
        f"feedback.source={tmp_path / 'log.jsonl'}",
        "feedback.format=thumbs",
        f"feedback.prompts={tmp_path / 'prompts.jsonl'}",
    ]
    small = ["rollout.prompts_per_step=8", "rollout.max_new_tokens=16", "loop.steps=2", "reward.epochs=1", "reward.compare=[]"]
    chosen = ["reward.method=truncated_ips", "learner.algorithm=plain_rloo", "loop.trackers=[csv]", "reward.rho=[0.05,0.05]"]
    job(plugin, "train-policy", f"run.dir={tmp_path}", "run.name=ours", "world.users=none", *ONE_PROCESS, *log, *small, *chosen)
    run = tmp_path / "ours"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["policy_version"] == 2
    assert list(summary["reward_fit"]["heldout_risk"]) == ["truncated_ips"]
    assert {line.split(",")[0] for line in (run / "tracked.csv").read_text(encoding="utf-8").splitlines()[1:]} == {"0", "1"}
