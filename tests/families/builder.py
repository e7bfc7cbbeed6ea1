"""Tiny models with random weights of the families that people have, as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 200
WORDS = ["<pad>", "<eos>", "<user>", "<bot>"] + [f"w{number}" for number in range(VOCAB - 4)]
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<bot>"
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.08,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
SOFT_CAPS: dict[str, Any] = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}  # low, so that they matter
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3": lambda: Qwen3Config(**SIZE),
    "Mixtral": lambda: MixtralConfig(**SIZE, **EXPERTS, num_local_experts=4),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(**SIZE, **EXPERTS, num_experts=4, moe_intermediate_size=128, norm_topk_prob=True),
    "Gemma 2": lambda: Gemma2Config(**SIZE, **SOFT_CAPS, query_pre_attn_scalar=32, sliding_window=32),
}


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def build(family: str, folder: Path) -> None:
    """Write a model of the family, with a tokenizer of words."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(folder)
