"""A language model with one linear head: token ids in, one logit out: a reward model of
which all weights were tuned (`reward.tune=full`)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from causalrm_ray.models.kernels import load, use_onednn
from causalrm_ray.models.size import GROUP, GROUP_TOKENS, KEPT_TOKENS
from causalrm_ray.models.text import answer_template

HEAD = frozenset({"score.weight", "score.bias"})  # weights that a backbone's files lack


class SequenceScorer(nn.Module):
    """Logit of a row of token ids: s(x) = w^T h_T(x), h_T the backbone's state [D] at the row's true last token.

    Rows are found by their lengths, never by comparing ids with the padding id: where padding and end-of-sequence share an
    id, a search for padding would take the token before the end. Right padding cannot change a logit under causal attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise ValueError(f"the model must have a linear head `score` with one output, got {type(model).__name__}")
        self.model = model

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> SequenceScorer:
        """The scorer in a folder or hub id: a saved one, or a causal model (its language model alone) under a new head.

        A new head is zero, so that every logit starts at 0 and a fit depends on no random draw here.
        Raises ValueError for an architecture without a linear head `score` (encoders such as BERT).
        """
        with quiet_transformers(), torch.random.fork_rng(devices=[]):  # loading draws a random head, which is replaced below
            model, loading = load(AutoModelForSequenceClassification, str(source), dtype, num_labels=1)
        scorer, missing = cls(model), set(loading["missing_keys"])
        if foreign := missing - HEAD:
            raise ValueError(f"the weights of {source} must cover the backbone, missing {sorted(foreign)[:3]}")
        if missing:
            nn.init.zeros_(scorer.head.weight)
        use_onednn(scorer.model.base_model)
        return scorer

    @property
    def head(self) -> nn.Linear:
        """The linear map [1, D] from a state to a logit."""
        return cast(nn.Linear, self.model.score)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logit [B] of right-padded `input_ids` [B, T] with `lengths` [B] in 1..T."""
        return self.head(self.states(input_ids, lengths)).squeeze(-1).float()

    def states(self, input_ids: Tensor, lengths: Tensor, group: int = GROUP, tokens: int = GROUP_TOKENS) -> Tensor:
        """States [B, D] at the last token of right-padded `input_ids` [B, T] with `lengths` [B] in 1..T.

        Rows go through the backbone in groups of like length, each cut to its longest row: a third less work on ragged rows. A
        group has at most `group` rows and `tokens` tokens with pads, or one row. With gradients, the groups after the first
        KEPT_TOKENS tokens keep their inputs only, and are computed again in the backward pass: long rows cost time, not memory.
        """
        order = lengths.argsort(stable=True)
        states, groups, kept = [], group_sizes(lengths[order].tolist(), group, tokens), 0
        for rows in order.split(groups):
            inputs = input_ids[rows, : int(lengths[rows].max())], lengths[rows]
            kept += inputs[0].numel()
            again = torch.is_grad_enabled() and kept > KEPT_TOKENS and len(groups) > 1
            states.append(checkpoint(self._states, *inputs, use_reentrant=False) if again else self._states(*inputs))
        found = torch.cat(states)
        return torch.empty_like(found).index_copy(0, order, found)

    def _states(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]).to(torch.long)
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a plain Hugging Face folder that AutoModelForSequenceClassification and AutoTokenizer load.

        The saved chat template renders a conversation that ends in an answer to the ids that the model was trained on. The
        weights are as trained, but for a row of the embedding where there was none to pad with: see `save_settings`.
        """
        padding = self.save_settings(folder, tokenizer)
        if padding >= embedding_rows(self.model):
            self.model.resize_token_embeddings(padding + 1, mean_resizing=False)
        with self._padded_with(padding), quiet_transformers():
            self.model.save_pretrained(folder)
            config = self.model.config
            config.architectures = [_architecture(config) or type(self.model).__name__]
            config.save_pretrained(folder)

    def save_settings(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> int:
        """Write the folder but for its weights; returns the id of the token that it pads with.

        Stock code finds a row's end by comparing ids with `config.pad_token_id`. Rows end in the end-of-sequence token, so a
        tokenizer that pads with that token is saved with another padding token: one of its own, or a new one.
        """
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.chat_template is not None:
            tokenizer.chat_template = answer_template(tokenizer)
        tokenizer.add_special_tokens({"pad_token": padding_token(tokenizer)})
        tokenizer.save_pretrained(folder)
        padding = cast(int, tokenizer.pad_token_id)
        with self._padded_with(padding):
            self.model.config.save_pretrained(folder)
        return padding

    @contextmanager
    def _padded_with(self, token: int) -> Iterator[None]:
        """Let the configuration name this padding token, and have a row for it, while the block lasts."""
        text = self.model.config.get_text_config()
        config, before = self.model.config, (self.model.config.pad_token_id, text.vocab_size)
        config.pad_token_id, text.vocab_size = token, max(text.vocab_size, token + 1)
        try:
            yield
        finally:
            config.pad_token_id, text.vocab_size = before


def _architecture(config: PreTrainedConfig) -> str | None:
    """What vLLM knows the model's classifier by: the name of the causal model, whose own classifier may be called otherwise
    (Gemma3ForCausalLM, but Gemma3TextForSequenceClassification). transformers goes by the type of the configuration."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    name = getattr(causal, "__name__", "")
    return name.replace("ForCausalLM", "ForSequenceClassification") if name.endswith("ForCausalLM") else None


def group_sizes(lengths: Sequence[int], most: int, tokens: int) -> list[int]:
    """Sizes of consecutive groups of rows of ascending `lengths`: at most `most` rows and `tokens` tokens, or one row."""
    sizes: list[int] = []
    for length in lengths:
        if sizes and sizes[-1] < most and (sizes[-1] + 1) * length <= tokens:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


def embedding_rows(model: PreTrainedModel) -> int:
    """How many ids a model has an embedding for; a tokenizer may have fewer, or more."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with that ends no row: the padding token if it is not also the end, else another special one, or where there
    is none, as in GPT-2's tokenizer, one that no vocabulary holds."""
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *special):
        if token is not None and token != tokenizer.eos_token:
            return token
    return "<|causalrm_pad|>"


def score_rows(scorer: SequenceScorer, rows: Sequence[Sequence[int]], batch_size: int = 128) -> Tensor:
    """Logit [N] (float32, on the CPU) of each row of token ids, without dropout.

    Rows are batched in order of length and content, so that the same set of rows gives the same bits in whatever order it
    comes; another set of companions in a batch may change a logit by about 1e-7. Raises ValueError for an empty row.
    """
    return _in_batches(scorer, scorer, rows, batch_size).reshape(-1)


def row_states(scorer: SequenceScorer, rows: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """State [N, D] (float32, on the CPU) at the last token of each row of token ids, without dropout; as `score_rows`.

    `batch_size` rows go through the backbone at a time.
    """
    return _in_batches(scorer, partial(scorer.states, group=batch_size, tokens=sys.maxsize), rows, batch_size)


@torch.inference_mode()
def _in_batches(
    scorer: SequenceScorer, compute: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Sequence[int]], batch_size: int
) -> Tensor:
    """`compute`(input_ids [B, T], lengths [B]) of batches of rows of like length, in the order of the rows; [0] for no rows."""
    empty = [number for number, row in enumerate(rows) if len(row) == 0]
    if empty:
        raise ValueError(f"every row must hold at least one token, got none in row {empty[0]}")
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), tuple(rows[number])))
    found = []
    training = scorer.training
    scorer.eval()
    for start in range(0, len(rows), batch_size):
        batch = [torch.tensor(rows[number], dtype=torch.long) for number in order[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in batch])
        input_ids = pad_sequence(batch, batch_first=True).to(scorer.model.device)
        found.append(compute(input_ids, lengths.to(input_ids.device)).float().cpu())
    scorer.train(training)
    if not found:
        return torch.empty(0)
    values = torch.cat(found)
    return torch.empty_like(values).index_copy(0, torch.tensor(order), values)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report that a new head is missing from a checkpoint, which is how every scorer starts."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
