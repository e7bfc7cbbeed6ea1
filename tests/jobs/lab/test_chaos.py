"""Three deaths of a real run on three raylets: of a generator, of the driver and of a node. The job itself kills more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from causalrm_ray.checkpoint import atomic_folder
from jobs.lab.chaos_audit import differences, differing


@pytest.mark.timeout(1200)
def test_killed_roles_nodes_and_drivers_lose_and_double_nothing(tmp_path: Path) -> None:
    options = [
        "victims=[generator,driver,node]",
        "kills=3",
        "steps=10",
        "engine=hf",
        "train_workers=0",
        "baseline=false",
        f"run.dir={tmp_path}",
    ]
    done = subprocess.run([sys.executable, "-m", "jobs", "chaos", *options], stdout=subprocess.PIPE, text=True)
    found = json.loads((tmp_path / "chaos" / "chaos.json").read_text(encoding="utf-8"))
    assert found["faults"] == []
    assert done.returncode == 0
    assert sorted(kill["victim"] for kill in found["kills"]) == ["driver", "generator", "node"]
    assert all(kill["seconds"] > 0 for kill in found["kills"])


def test_what_is_lost_and_what_is_there_twice_is_named() -> None:
    assert differences("prompts", Counter("ab"), Counter("ab")) == []
    found = differences("prompts", Counter("abcd"), Counter("bbd"))
    assert found == ["2 prompts lost, such as a", "1 prompts too many, such as b"]


def finished(run: Path, rows: list[dict[str, Any]], weight: float) -> Path:
    """A run as its end leaves it."""
    with atomic_folder(run / "checkpoints" / "step-2") as folder:
        (folder / "policy").mkdir()
        save_file({"weight": torch.tensor([1.0, weight])}, folder / "policy" / "model.safetensors")
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return run


def test_runs_are_compared_to_the_bit_but_for_times(tmp_path: Path) -> None:
    rows = [{"kl": 0.1, "seconds": 1.0}, {"kl": 0.2, "seconds": 1.0}]
    calm = finished(tmp_path / "calm", rows, 0.5)
    assert differing(finished(tmp_path / "same", [{**row, "seconds": 9.0} for row in rows], 0.5), calm) == []

    def fault(name: str, rows: list[dict[str, Any]], weight: float = 0.5) -> list[str]:
        return differing(finished(tmp_path / name, rows, weight), calm)

    differ = "1 figures and weights differ from the baseline's, such as "
    assert fault("kl", [rows[0], {"kl": 0.2000000001, "seconds": 1.0}]) == [f"{differ}kl of step 1"]
    assert fault("missing", [{"seconds": 1.0}, rows[1]]) == [f"{differ}kl of step 0"]
    assert fault("more", [{**rows[0], "ess": 1.0}, rows[1]]) == [f"{differ}ess of step 0"]
    assert fault("weight", rows, 0.50000006) == [f"{differ}weight"]
    (tmp_path / "same" / "checkpoints" / "step-2" / "manifest.json").unlink()
    assert differing(tmp_path / "same", calm) == [f"{differ}weight"]
