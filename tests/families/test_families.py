"""Families of models give what transformers gives: engines before and after syncs, learner, reward models by every path.

One run of the job for all families without vLLM, one with it for those whose code in vLLM differs most; `causalrm-ray families`
runs all of both.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.rollout.engine import EngineSettings
from actors.rollout.vllm_engine import VllmEngine
from causalrm_ray.checkpoint import read_json
from causalrm_ray.config.families import FamilyName
from causalrm_ray.errors import InputError
from causalrm_ray.models.checks.check import check_backbone, check_policy
from causalrm_ray.models.lora import with_adapter
from causalrm_ray.models.policy import load_policy
from jobs.lab.families.builder import FAMILIES, LENGTH, build
from jobs.lab.families.table import ENGINE, NAMES, Findings

ALL = get_args(FamilyName)
ON_VLLM = ("Mixtral", "Gemma 2", "Gemma 3 with images", "GPT-NeoX")  # the last: in transformers' classes
WITHOUT_LORA = ("DeepSeek-V3",)  # peft would adapt its experts, too
pytestmark = pytest.mark.timeout(900)


def run(folder: Path, engine: str, families: Sequence[str], parts: str) -> dict[str, Findings]:
    """What the job finds, by family. It runs in a process of its own: engines change torch for theirs."""
    chosen = f"families=[{','.join(families)}]"
    where = [f"run.dir={folder}", f"run.name={engine}", f"run.cache={folder / 'cache'}"]
    command = [sys.executable, "-m", "jobs", "families", chosen, f"engines=[{engine}]", f"parts=[{parts}]", *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert (folder / engine / "families.json").exists(), done.stderr[-2000:]
    return {kept["family"]: Findings(**kept) for kept in read_json(folder / engine / "families.json")}


@pytest.fixture(scope="module")
def in_transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Findings]:
    return run(tmp_path_factory.mktemp("families"), "hf", ALL, "engines,reward,learner")


@pytest.fixture(scope="module")
def in_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Findings]:
    return run(tmp_path_factory.mktemp("families"), "vllm", ON_VLLM, "engines,reward")


@pytest.mark.parametrize("family", ALL)
def test_a_family_is_right_in_the_learner_the_reward_model_and_transformers_engine(
    family: str, in_transformers: dict[str, Findings]
) -> None:
    found = in_transformers[family]
    assert found.reasons == {}
    assert found.passed(), found.figures
    assert set(found.figures["hf"]) == set(ENGINE) - ({"adapter"} if family in WITHOUT_LORA else set())
    assert set(found.figures["learner"]) == set(NAMES["learner"])
    assert set(found.figures["reward"]) == {"transformers", "rollout, log", "chat, log"}


@pytest.mark.parametrize("family", ON_VLLM)
def test_a_family_is_right_in_vllm_before_and_after_syncs_and_its_reward_model_in_vllms_classifier(
    family: str, in_vllm: dict[str, Findings]
) -> None:
    found = in_vllm[family]
    assert found.reasons == {}
    assert found.passed(), found.figures
    assert set(found.figures["vllm"]) == set(ENGINE)
    assert set(found.figures["reward"]) == set(NAMES["reward"])


def test_each_family_that_may_be_named_is_built() -> None:
    assert set(FAMILIES) == set(ALL)


@pytest.mark.parametrize("family", ALL)
def test_a_family_passes_the_check_of_its_files(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    policy, backbone = check_policy(str(tmp_path), LENGTH), check_backbone(str(tmp_path), LENGTH)
    assert set(policy.ends) == set(backbone.ends) >= set(FAMILIES[family].ends)


@pytest.mark.parametrize(
    ("figures", "reasons"),
    [({"as loaded": 2e-5}, {}), ({"as loaded": math.nan}, {}), ({"resumed": 1e-9}, {}), ({}, {"vllm": "failed: KeyError: gate"})],
    ids=["differs", "nan", "resumed otherwise", "failed"],
)
def test_a_family_is_not_right(figures: dict[str, float], reasons: dict[str, str]) -> None:
    assert not Findings("Llama 3", {"part": figures}, reasons).passed()


def test_a_model_whose_weights_vllm_cannot_replace_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    build("GPT-OSS", tmp_path)
    check_policy(str(tmp_path), engine="hf")
    with pytest.raises(InputError, match=r"cannot take new weights .* gpt_oss: .*rollout\.engine=hf"):
        check_policy(str(tmp_path), engine="vllm")
    with pytest.raises(InputError, match=r"cannot take new weights .* gpt_oss: .*rollout\.engine=hf"):
        VllmEngine(EngineSettings(str(tmp_path), 64, "float32", str(tmp_path / "cache"), 60.0, 4))


@pytest.mark.parametrize("family", WITHOUT_LORA)
def test_lora_is_refused_where_peft_would_adapt_what_engines_do_not_get(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    with pytest.raises(ValueError, match=r"would adapt experts, too, such as .*mlp\.experts"):
        with_adapter(load_policy(str(tmp_path), torch.float32), 2, seed=0)


def test_of_a_model_that_also_sees_the_language_model_is_used_and_saved(tmp_path: Path) -> None:
    build("Gemma 3 with images", tmp_path / "whole")
    model = str(tmp_path / "whole")
    check_policy(model)
    check_backbone(model)
    policy, ids = load_policy(model, torch.float32), torch.arange(10, 40)[None]
    policy.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert policy.num_parameters() < AutoModelForCausalLM.from_pretrained(model).num_parameters()
    assert (type(policy).__name__, type(saved).__name__) == ("Gemma3ForCausalLM", "Gemma3ForCausalLM")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        for found in (policy, saved):
            torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_policy_whose_files_lack_a_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    build("Qwen3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"must cover Qwen3ForCausalLM, model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_policy(str(tmp_path), torch.float32)
