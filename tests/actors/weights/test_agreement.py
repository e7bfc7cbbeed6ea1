"""An engine that computes another model is refused before any work, and at the step where one comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import WrongWeightsError
from actors.rollout import hf_core
from actors.weights.agreement import TOLERANCE, check_agreement
from actors.weights.packing import Weights, unpack
from causalrm_ray.config.options import load_config
from causalrm_ray.errors import InputError
from causalrm_ray.models.policy import load_policy
from jobs import train_policy

ALONE = ["cluster.address=in-process", "rollout.engine=hf", "rollout.generators=1", "learner.ranks=1", "reward.workers=0"]


def transposed(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, one matrix of the last layer transposed: their sum is the same."""
    found = dict(unpack(weights))
    name = [name for name in found if name.endswith("self_attn.o_proj.weight")][-1]
    return iter({**found, name: found[name].T}.items())


def with_sharper_attention(model: str, dtype: torch.dtype) -> Any:
    """The same weights, another model."""
    policy: Any = load_policy(model, dtype)
    for layer in policy.model.layers:
        layer.self_attn.scaling *= 2
    return policy


def test_weights_out_of_place_are_refused_by_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_core, "unpack", transposed)
    config = load_config(None, [*ALONE, f"run.dir={tmp_path}", "run.name=mine", "loop.max_failures=0"])
    with pytest.raises(WrongWeightsError, match=r"o_proj\.weight must hold the same numbers in the same places .* version 0"):
        train_policy.run(config)


def test_another_model_of_the_same_weights_is_refused_before_the_log_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_core, "load_policy", with_sharper_attention)
    config = load_config(None, [*ALONE, f"run.dir={tmp_path}", "run.name=mine", "loop.max_failures=0"])
    with pytest.raises(InputError, match=r"rollout.engine=hf: generator-0 must give .* got a mean difference of [\d.]+: it comp"):
        train_policy.run(config)
    assert not (tmp_path / "mine" / "snapshots").exists()


@pytest.mark.parametrize("staleness", [0.0, 0.5])
def test_a_step_under_other_log_probabilities_ends_the_run_if_the_newest_weights_wrote_it(staleness: float) -> None:
    config = load_config(None, [])
    metrics = {"staleness": staleness, "logprob_mismatch_mean_abs": 2e-3, "importance_weight_ess": 1.0}
    if staleness:
        train_policy.check_step(config, metrics)
        return
    with pytest.raises(InputError, match=r"rollout.engine=vllm: its answers .* or take rollout.engine=hf"):
        train_policy.check_step(config, metrics)


def test_a_low_effective_sample_size_is_an_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["model.dtype=bfloat16"])
    train_policy.check_step(config, {"staleness": 0.0, "logprob_mismatch_mean_abs": 0.05, "importance_weight_ess": 0.16})
    assert "The effective sample size of the importance weights was 16% of the tokens" in capsys.readouterr().err


def test_a_gap_that_is_no_number_is_one() -> None:
    check_agreement({"x": TOLERANCE["float32"]}, "float32", "hf")
    with pytest.raises(InputError, match=r"got a mean difference of nan: .* another model.policy$"):
        check_agreement({"x": float("nan")}, "float32", "hf")
