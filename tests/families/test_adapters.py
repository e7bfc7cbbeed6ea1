"""An adapter that was synced makes of an engine what peft makes of the model, over families of models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, GPTNeoXConfig, OPTConfig, Phi3Config, PreTrainedConfig

from causalrm_ray.models.lora import adapter_of, save_adapter, with_adapter
from causalrm_ray.models.policy import load_policy
from tests.families.adapted_answers import Answer, answers
from tests.families.builder import FAMILIES, SIZE, VOCAB, save_tokenizer

TOLERANCE = 1e-5  # nats, in float32: other orders of sums; 5e-6 was measured
RANK = 3
IDS = {name: SIZE[name] for name in ("eos_token_id", "pad_token_id", "bos_token_id")}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SIZE.items() if name not in names}


def old(**names: int | float) -> dict[str, Any]:
    """Sizes under the names that older configurations have for them."""
    return {"vocab_size": VOCAB, **IDS, **names}


ADAPTED: dict[str, Callable[[], PreTrainedConfig]] = FAMILIES | {
    "Pythia": lambda: GPTNeoXConfig(**without("num_key_value_heads", "head_dim"), tie_word_embeddings=False),
    "OPT": lambda: OPTConfig(
        **old(hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, init_std=0.08)
    ),
    "GPT-2": lambda: GPT2Config(**old(n_embd=128, n_layer=2, n_head=4, n_positions=128, initializer_range=0.08)),
    "Falcon": lambda: FalconConfig(
        **old(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, initializer_range=0.08),
        new_decoder_architecture=True,
    ),
    "Phi 3": lambda: Phi3Config(**without("head_dim"), tie_word_embeddings=False),
}


@torch.no_grad()
def gap(model: torch.nn.Module, found: Sequence[Answer]) -> float:
    """The largest |difference|, nats, over all tokens of the answers."""
    largest = 0.0
    for prompt, ids, logprobs in found:
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        largest = max(largest, float((expected - torch.tensor(logprobs, dtype=torch.float64)).abs().max()))
    return largest


def in_another_process(engine: str, *folders: str) -> list[list[Answer]]:
    command = [sys.executable, "-m", "tests.families.adapted_answers", engine, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("family", "engine"),
    [*((family, "hf") for family in ADAPTED), ("Pythia", "vllm"), ("Phi 3", "vllm"), ("Mixtral", "vllm")],
)
def test_an_engine_that_took_an_adapter_computes_what_peft_does(family: str, engine: str, tmp_path: Path) -> None:
    folder, adapter, cache = (str(tmp_path / name) for name in ("model", "adapter", "cache"))
    save_tokenizer(Path(folder))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ADAPTED[family]()).save_pretrained(folder)
    adapted = with_adapter(load_policy(folder, torch.float32), RANK, seed=0)
    save_adapter(Path(adapter), adapted, {name: torch.randn_like(weight.value()) / 10 for name, weight in adapter_of(adapted)})
    loaded, synced = (answers if engine == "hf" else in_another_process)(engine, folder, adapter, cache)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert gap(plain, loaded) <= TOLERANCE
    assert gap(plain, synced) > 0.1
    assert gap(PeftModel.from_pretrained(plain, adapter), synced) <= TOLERANCE
