"""Weights that an engine has already must not change when they are sent: a sum of all of them cannot tell places."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.weights.packing import pack
from causalrm_ray.models.policy import load_policy
from causalrm_ray.registry import ENGINES
from causalrm_ray.types import Sampling
from jobs.lab.families.builder import LENGTH, build

QUERY = "model.layers.1.self_attn.q_proj.weight"  # square
EXPERTS = "model.layers.1.mlp.experts.down_proj"
MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    QUERY: lambda matrix: matrix.T.contiguous(),
    EXPERTS: lambda experts: experts[[1, 0, *range(2, len(experts))]],
}


def refusal(engine: str, folder: str, cache: str, moved: str) -> str:
    """What the engine says to the weights that it loaded, but for those of the parameter `moved`; empty if nothing."""
    settings = EngineSettings(folder, LENGTH, "float32", cache, 300.0, 4)
    generator = Generator(engine, settings, Sampling(max_new_tokens=4))
    named = dict(load_policy(folder, torch.float32).named_parameters())
    if moved:
        named[moved] = MOVES[moved](named[moved].detach())
    try:
        generator.take_weights(pack(0, named.items()))
    except Exception as error:  # noqa: BLE001 - its text is compared
        return str(error)
    finally:
        generator.close()
    return ""


@pytest.mark.parametrize("moved", [QUERY, EXPERTS])
def test_a_matrix_or_an_expert_out_of_place_is_refused_at_the_first_sync(moved: str, tmp_path: Path) -> None:
    build("Mixtral", tmp_path)
    assert refusal("hf", str(tmp_path), str(tmp_path), "") == ""
    assert f"{moved} must hold the same numbers in the same places after a sync of version 0" in refusal(
        "hf", str(tmp_path), str(tmp_path), moved
    )


@pytest.mark.timeout(600)
def test_experts_that_changed_places_are_refused_by_vllm(tmp_path: Path) -> None:
    build("Mixtral", tmp_path / "model")
    command = [sys.executable, "-m", "tests.families.test_places", str(tmp_path / "model"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "w2_weight must hold the same numbers in the same places after a sync of version 0" in done.stdout


if __name__ == "__main__":
    os.environ.update(ENGINES.load("vllm").process_env(sys.argv[1], sys.argv[2], gpu=False))
    print(refusal("vllm", sys.argv[1], sys.argv[2], EXPERTS))  # noqa: T201
