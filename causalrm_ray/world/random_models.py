"""Randomly initialised Llamas of known sizes, with the embedded world's tokenizer: for measuring speed only."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from transformers import LlamaForCausalLM

from causalrm_ray.checkpoint import cached_folder
from causalrm_ray.world import grammar
from causalrm_ray.world.pretrain import PretrainSettings, llama_config, train_tokenizer

SIZES = {  # parameters, embeddings (tied) included; heads of 32 and 64
    "0.94M": PretrainSettings(hidden=128, heads=4, layers=4, intermediate=376),
    "26M": PretrainSettings(hidden=512, heads=8, layers=8, intermediate=1376),
}
LINES = 4000  # answers that the tokenizer is trained on


def ensure_random_model(cache: Path, size: str) -> Path:
    """The Hugging Face folder of the Llama of a `size`, a key of SIZES: made on the first call, then found in `cache`."""
    settings = SIZES[size]

    def fill(folder: Path) -> None:
        rng = random.Random(0)
        prompts = rng.choices(grammar.train_prompts() + grammar.evaluation_prompts(), k=LINES)
        tokenizer = train_tokenizer([*prompts, *(grammar.sample_response(prompt, rng) for prompt in prompts)], settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(llama_config(tokenizer, settings)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(cache.expanduser().resolve() / "random" / f"{size}-{transformers.__version__}", fill)
