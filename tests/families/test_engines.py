"""Engines compute what transformers does, over families of models, before and after weights are synced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families.builder import build

TOLERANCE = 1e-5  # nats, in float32: other orders of sums; 3e-6 was measured


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("family", "engine"),
    [("Mixtral", "vllm"), ("Qwen3-MoE", "vllm"), ("Gemma 2", "vllm"), ("Mixtral", "hf"), ("Qwen3-MoE", "hf"), ("Gemma 2", "hf")],
)
def test_log_probabilities_are_those_of_transformers_before_and_after_a_sync(family: str, engine: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model")
    command = [sys.executable, "-m", "tests.families.engine_gaps", engine, str(tmp_path / "model"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert {name: value for name, value in gaps.items() if value > TOLERANCE} == {}
