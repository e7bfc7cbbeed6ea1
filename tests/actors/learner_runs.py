"""Ranks of the learner, each in a process of its own, and what they left: for the tests of the learner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from actors.cluster.ports import free_port

SCENARIOS = Path(__file__).with_name("learner_scenarios.py")
TOLERANCE = 1e-5  # relative, of the norm


def start(world_size: int, folder: Path, names: Sequence[str]) -> list[subprocess.Popen]:
    port = free_port("127.0.0.1")
    root = SCENARIOS.parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    ranks = []
    for rank in range(world_size):
        command = [sys.executable, str(SCENARIOS), str(rank), str(world_size), str(port), str(folder), *names]
        with (folder / f"log-{world_size}-{rank}.txt").open("w") as log:
            ranks.append(subprocess.Popen(command, env=env, cwd=root, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def vector(file: Path) -> torch.Tensor:
    tensors = load_file(file)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def weights_of(folder: Path, name: str) -> torch.Tensor:
    return vector(folder / name / "model.safetensors")


def metrics_of(folder: Path, name: str) -> list[dict[str, float]]:
    return json.loads((folder / name / "metrics.json").read_text())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
