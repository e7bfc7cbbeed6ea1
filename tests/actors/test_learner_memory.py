"""Adapters, and updates in less memory: on the same ranks as the tests of the whole learner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_runs import TOLERANCE, distance, metrics_of, weights_of
from learner_scenarios import ADAPTED, SAVING, TEMPERATURE, make_step
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LORA = ("lora-0-1", "lora-2-2", "lora-3-2")  # ZeRO stage, ranks


@pytest.fixture(scope="module")
def folder(learner_folder: Path) -> Path:
    return learner_folder


def logprobs(model: torch.nn.Module, answer) -> torch.Tensor:
    prompt, tokens = answer.completion.prompt.token_ids, answer.completion.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0] / TEMPERATURE
    return torch.stack([logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(tokens)])


@pytest.mark.parametrize("name", LORA)
def test_adapters_end_in_the_same_place_on_one_rank_and_on_two(folder: Path, name: str) -> None:
    before, expected, found = (weights_of(folder, part) for part in ("model", "lora-0-1", name))
    assert distance(found, expected) <= TOLERANCE
    assert distance(found - before, expected - before) <= 1e-3
    assert distance(expected, before) >= 1e-3
    for row, of_one in zip(metrics_of(folder, name), metrics_of(folder, "lora-0-1"), strict=True):
        assert row == pytest.approx(of_one, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("name", LORA)
def test_merged_weights_are_the_first_ones_and_a_naive_product_of_the_saved_adapter(folder: Path, name: str) -> None:
    first, merged = load_file(folder / "model" / "model.safetensors"), load_file(folder / name / "weights.safetensors")
    saved = load_file(folder / name / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == first.keys()
    for key, weight in first.items():
        factors = [saved.get(f"base_model.model.{key.removesuffix('weight')}{part}.weight") for part in ("lora_A", "lora_B")]
        if factors[0] is None:
            assert torch.equal(merged[key], weight)
            continue
        a, b = (factor.double().numpy() for factor in factors)
        change = 2 * sum(np.outer(b[:, k], a[k]) for k in range(ADAPTED["lora"]))
        np.testing.assert_allclose(merged[key].double().numpy(), weight.double().numpy() + change, rtol=1e-5, atol=1e-6)
        assert np.abs(change).max() > 1e-3
    published = load_file(folder / name / "published.safetensors")
    assert published.keys() == saved.keys()
    assert len(saved) == 2 * 2 * 7  # A and B of seven linear layers in each of two
    assert all(torch.equal(published[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", LORA)
def test_what_engines_and_peft_load_says_what_the_learner_says_and_its_reference_what_the_first_model_does(
    folder: Path, name: str
) -> None:
    said, answer = load_file(folder / name / "said.safetensors"), make_step(2)[0]
    first = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = AutoModelForCausalLM.from_pretrained(folder / name)
    expected = {"reference": logprobs(first, answer), "logprobs": logprobs(merged, answer)}
    adapted = PeftModel.from_pretrained(first, folder / name / "adapter")
    torch.testing.assert_close(logprobs(adapted, answer), said["logprobs"], rtol=1e-5, atol=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(said[key], value, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(said["logprobs"], said["reference"], atol=1e-2)


def test_adapters_are_what_is_trained_and_small_beside_the_model_in_state_and_sync(folder: Path) -> None:
    info = json.loads((folder / "lora-3-2" / "info.json").read_text())
    factors = sum(value.numel() for value in load_file(folder / "lora-3-2" / "published.safetensors").values())
    assert factors == 2 * 2 * (4 * (64 + 64) + 3 * (64 + 96))  # rank x layers x (in + out) of the linear ones
    assert info["trained"] == 2 * factors + 65  # the critic's adapter, and its head
    assert info["parameters"] == sum(value.numel() for value in load_file(folder / "model" / "model.safetensors").values())
    state = folder / "state-lora-0" / "engine" / "mp_rank_00_model_states.pt"
    assert state.stat().st_size < 12 * info["trained"] + 100_000 < 4 * info["parameters"]


@pytest.mark.parametrize("name", SAVING)
def test_less_memory_leads_to_the_same_weights(folder: Path, name: str) -> None:
    expected, found = weights_of(folder, f"{name.removeprefix('saving-')}-2"), weights_of(folder, f"{name}-2")
    before = weights_of(folder, "model")
    assert distance(found, expected) <= 1e-6
    assert distance(found - before, expected - before) <= 1e-4


@pytest.mark.parametrize(("stage", "world_size"), [("lora-0", 1), ("lora-3", 2)])
def test_adapters_resume_as_if_uninterrupted(folder: Path, stage: str, world_size: int) -> None:
    whole, resumed = f"uninterrupted-{stage}-{world_size}", f"resumed-{stage}-{world_size}"
    assert torch.equal(weights_of(folder, resumed), weights_of(folder, whole))
    assert metrics_of(folder, resumed) == metrics_of(folder, whole)
    assert not torch.equal(weights_of(folder, resumed), weights_of(folder, f"{stage}-{world_size}"))
