"""The starting policy: a tiny Llama and its tokenizer, taught the grammar in under a minute and kept in a cache.

grammar text -> BPE tokenizer -> batches of chat-formatted (prompt, response, description) -> Llama -> Hugging Face folder

After the end of an answer the model learns to go on with words that describe it (grammar.describe), in any order. So its state
at the end knows what was asked and done, as the states of a large pretrained model do, and a reward model has something to
stand on. Which of it users like is nowhere in that text. Engines stop at the end and never see the description.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from causalrm_ray.checkpoint import cached_folder
from causalrm_ray.models import text
from causalrm_ray.world import grammar

PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Progress = Callable[[int, int, float], None]  # (step, steps, loss in nats per token)


@dataclass(frozen=True)
class PretrainSettings:
    """Size and one-pass training of the starting policy. Heads of 32: the smallest that vLLM's CPU attention takes."""

    hidden: int = 128
    heads: int = 4
    layers: int = 2
    intermediate: int = 256
    positions: int = 512
    vocab: int = 1024
    examples: int = 24576
    batch: int = 32
    lr: float = 6e-3
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    sharpening: float = 1.2


def ensure_policy(cache: Path, seed: int, on_progress: Progress | None = None) -> Path:
    """The Hugging Face folder of the starting policy, trained on the first call, then found in `cache`.

    The folder's name is a hash of grammar, code, settings, seed and library versions. It appears whole or not at all, is made
    again where a file of it was damaged, and concurrent callers train once. The same seed gives the same weights on one machine.
    """
    settings = PretrainSettings()

    def fill(folder: Path) -> None:
        for part in pretrain(settings, seed, on_progress):
            part.save_pretrained(folder)

    return cached_folder(cache.expanduser().resolve() / "policies" / _fingerprint(settings, seed), fill)


def pretrain(
    settings: PretrainSettings, seed: int, on_progress: Progress | None = None
) -> tuple[PreTrainedTokenizerBase, LlamaForCausalLM]:
    """Train tokenizer and model on `settings.examples` answers about all topics, held-out ones included."""
    rng = random.Random(seed)
    prompts = rng.choices(grammar.train_prompts() + grammar.evaluation_prompts(), k=settings.examples)
    pairs = [(prompt, grammar.sample_response(prompt, rng)) for prompt in prompts]
    descriptions = [_describe(*pair, rng) for pair in pairs]
    tokenizer = train_tokenizer([*descriptions, *(line for pair in pairs for line in pair)], settings)
    rows = [
        text.encode_pair(tokenizer, *pair) + tuple(tokenizer.encode(description, add_special_tokens=False))
        for pair, description in zip(pairs, descriptions, strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config(tokenizer, settings))
        _train(model, rows, tokenizer.get_vocab(), settings, rng, on_progress)
    _sharpen(model, settings.sharpening)
    return tokenizer, model.eval()


def _describe(prompt: str, response: str, rng: random.Random) -> str:
    """The words that describe an answer, in random order: any of them may come first, so its end must know them all."""
    parsed = grammar.parse(prompt, response)
    assert parsed is not None, "the grammar parses what it made"
    return " ".join(rng.sample(grammar.describe(parsed), k=3))


def train_tokenizer(lines: Sequence[str], settings: PretrainSettings) -> PreTrainedTokenizerBase:
    """A byte-level BPE in which every word of the grammar is one token. Any text round-trips, but for leading blanks."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
    )


def llama_config(tokenizer: PreTrainedTokenizerBase, settings: PretrainSettings) -> LlamaConfig:
    """The architecture of these settings over the tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _train(
    model: LlamaForCausalLM,
    rows: Sequence[Sequence[int]],
    vocab: Mapping[str, int],
    settings: PretrainSettings,
    rng: random.Random,
    on_progress: Progress | None,
) -> None:
    """AdamW with linear warm-up and decay on the cross-entropy of all tokens after the prompt."""
    steps = len(rows) // settings.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=steps, pct_start=settings.warmup, cycle_momentum=False, anneal_strategy="linear"
    )
    for step, input_ids in enumerate(_batches(rows, settings, rng, vocab[PAD]), start=1):
        context, target = input_ids[:, :-1], input_ids[:, 1:]
        answered = ((context == vocab[ASSISTANT]).cumsum(dim=1) > 0) & (target != vocab[PAD])
        states = model.model(context, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(states[answered]), target[answered])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        if on_progress is not None:
            on_progress(step, steps, loss.item())


def _sharpen(model: LlamaForCausalLM, factor: float) -> None:
    """Multiply every logit by `factor`, so that sampling at temperature 1 seldom leaves the grammar (the head has no bias)."""
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)


def _batches(rows: Sequence[Sequence[int]], settings: PretrainSettings, rng: random.Random, pad: int) -> Iterator[torch.Tensor]:
    """Right-padded batches [B, T] of rows of like length, in random order: causal attention never sees the padding."""
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row]), rng.random()))
    starts = list(range(0, len(rows) - settings.batch + 1, settings.batch))
    rng.shuffle(starts)
    for start in starts:
        picked = [torch.tensor(rows[row]) for row in order[start : start + settings.batch]]
        yield torch.nn.utils.rnn.pad_sequence(picked, batch_first=True, padding_value=pad)


def _fingerprint(settings: PretrainSettings, seed: int) -> str:
    sources = [inspect.getsource(module) for module in (grammar, text, sys.modules[__name__])]
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
    return hashlib.sha256(repr((sources, asdict(settings), seed, versions)).encode()).hexdigest()[:16]
