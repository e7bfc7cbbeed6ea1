"""Tiny models with random weights of the families that people have, as the folders that they have.

configuration, weights, tokenizer of the family's kind, chat template, what its generation stops at
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.falcon import FalconConfig
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from causalrm_ray.checkpoint import write_json
from jobs.lab.families import templates, tokenizers

LENGTH = 256  # tokens that every model can read
WIDTH, HEADS, LAYERS = 128, 4, 2
SIZE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.08,  # large, so that answers differ
}
HEAD: dict[str, Any] = {"head_dim": WIDTH // HEADS}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
SOFT_CAPS: dict[str, Any] = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}  # low, so that they matter
WINDOWS: dict[str, Any] = {"query_pre_attn_scalar": 32, "sliding_window": 16}  # narrow, for the same reason


@dataclass(frozen=True)
class Family:
    """A family of models.

    `config(vocab_size=..., bos_token_id=..., eos_token_id=..., pad_token_id=...)` is a tiny one's; `ends` are the tokens that
    its generation stops at; `spare` embeddings belong to no token, as where they were rounded up.
    """

    config: Callable[..., PreTrainedConfig]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    template: str
    ends: Sequence[str]
    spare: int = 0
    sees: bool = False  # whether it comes with a part for images


def _of(config: type[PreTrainedConfig], **fixed: Any) -> Callable[..., PreTrainedConfig]:
    return _small(config, **{**SIZE, **fixed})


def _small(config: type[PreTrainedConfig], **fixed: Any) -> Callable[..., PreTrainedConfig]:
    """Of a family whose sizes have names of their own."""
    return lambda **tokens: config(**{**fixed, **tokens})


def _gemma_3_with_images(**tokens: Any) -> PreTrainedConfig:
    text = Gemma3TextConfig(**{**SIZE, **HEAD, **WINDOWS, **tokens})
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    own = {key: tokens[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    images = {"boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9}  # see tokenizers.gemma
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **images, **own)


GEMMA_ENDS = ("<eos>", "<end_of_turn>")
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
FAMILIES: dict[str, Family] = {
    "Llama 2": Family(_of(LlamaConfig), tokenizers.llama_2, templates.LLAMA_2, ["</s>"]),
    "Llama 3": Family(
        _of(LlamaConfig, tie_word_embeddings=True), tokenizers.llama_3, templates.LLAMA_3, ["<|end_of_text|>", "<|eot_id|>"]
    ),
    "Mistral": Family(_of(MistralConfig, **HEAD, sliding_window=None), tokenizers.mistral, templates.MISTRAL, ["</s>"]),
    "Mixtral": Family(
        _of(MixtralConfig, **EXPERTS, **HEAD, num_local_experts=4), tokenizers.mistral, templates.MISTRAL, ["</s>"]
    ),
    "Qwen2.5": Family(_of(Qwen2Config, tie_word_embeddings=True), tokenizers.qwen, templates.CHATML, QWEN_ENDS, 37),
    "Qwen3": Family(_of(Qwen3Config, **HEAD), tokenizers.qwen, templates.CHATML, QWEN_ENDS, 37),
    "Qwen3-MoE": Family(
        _of(Qwen3MoeConfig, **EXPERTS, **HEAD, num_experts=4, moe_intermediate_size=128, norm_topk_prob=True),
        tokenizers.qwen,
        templates.CHATML,
        QWEN_ENDS,
        37,
    ),
    "Gemma 1": Family(
        _of(GemmaConfig, **HEAD, hidden_activation="gelu_pytorch_tanh"), tokenizers.gemma, templates.GEMMA, GEMMA_ENDS
    ),
    "Gemma 2": Family(_of(Gemma2Config, **HEAD, **SOFT_CAPS, **WINDOWS), tokenizers.gemma, templates.GEMMA, GEMMA_ENDS),
    "Gemma 3": Family(_of(Gemma3TextConfig, **HEAD, **WINDOWS), tokenizers.gemma, templates.GEMMA, GEMMA_ENDS),
    "Gemma 3 with images": Family(
        _gemma_3_with_images,
        lambda: tokenizers.gemma("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        templates.GEMMA,
        GEMMA_ENDS,
        sees=True,
    ),
    "Phi-3": Family(_of(Phi3Config), tokenizers.phi_3, templates.PHI_3, ["<|endoftext|>", "<|end|>"]),
    "GPT-2": Family(
        _small(GPT2Config, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_positions=LENGTH, initializer_range=0.08),
        lambda: tokenizers.gpt_2("<|im_start|>", "<|im_end|>"),
        templates.CHATML,
        QWEN_ENDS,
    ),
    "GPT-NeoX": Family(
        _of(GPTNeoXConfig, num_key_value_heads=HEADS), tokenizers.gpt_neox, templates.PLAIN_TURNS, ["<|endoftext|>"], 13
    ),
    "OPT": Family(
        _small(
            OPTConfig,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LENGTH,
            init_std=0.08,
        ),
        tokenizers.opt,
        templates.WITH_BEGINNING,
        ["</s>"],
    ),
    "OLMo 2": Family(_of(Olmo2Config), tokenizers.olmo_2, templates.WITH_BEGINNING, ["<|endoftext|>"], 5),
    "Falcon": Family(
        _of(FalconConfig, num_kv_heads=1, multi_query=True, alibi=False, bias=False, parallel_attn=True),
        lambda: tokenizers.byte_level_with("<|im_end|>", "<|endoftext|>", None, "<|im_start|>"),
        templates.CHATML,
        QWEN_ENDS,
    ),
    "GPT-OSS": Family(
        _of(GptOssConfig, **EXPERTS, **HEAD, num_local_experts=4, sliding_window=16, rope_scaling=None),
        lambda: tokenizers.byte_level_with(
            "<|return|>", "<|endoftext|>", "<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"
        ),
        templates.GPT_OSS,
        ["<|return|>", "<|endoftext|>", "<|call|>"],
    ),
    "DeepSeek-V3": Family(
        _of(
            DeepseekV3Config,
            num_key_value_heads=HEADS,
            tie_word_embeddings=False,
            num_experts_per_tok=2,
            n_routed_experts=4,
            n_shared_experts=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            n_group=2,
            topk_group=1,
            moe_intermediate_size=128,
            first_k_dense_replace=1,
            q_lora_rank=64,
            kv_lora_rank=512,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            rope_scaling=None,
        ),
        lambda: tokenizers.byte_level_with(
            "<|end_of_sentence|>", "<|pad|>", "<|begin_of_sentence|>", "<|User|>", "<|Assistant|>"
        ),
        templates.DEEPSEEK,
        ["<|end_of_sentence|>"],
    ),
}


def build(family: str, folder: Path) -> None:
    """Write a model of the family, a key of FAMILIES, drawn from a fixed seed."""
    kind = FAMILIES[family]
    tokenizer = kind.tokenizer()
    tokenizer.chat_template = kind.template
    tokenizer.model_max_length = LENGTH
    ends = [tokenizer.convert_tokens_to_ids(end) for end in kind.ends]
    tokens = {
        "vocab_size": len(tokenizer) + kind.spare,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind.config(**tokens), dtype=torch.float32)
        for parameter in model.parameters():  # as after training: no bias is 0, no scale 1
            if parameter.dim() == 1:
                parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(**{name: value for name, value in tokens.items() if name != "vocab_size"})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind.sees:
        size = {"height": 28, "width": 28}
        image = {"image_processor_type": "Gemma3ImageProcessor", "size": size, "image_seq_length": 4}
        write_json(folder / "preprocessor_config.json", image | {"processor_class": "Gemma3Processor"})
        write_json(folder / "processor_config.json", {"processor_class": "Gemma3Processor", "image_seq_length": 4})
