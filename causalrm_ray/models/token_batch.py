"""Answers as a model reads them: every row whole, or behind prompts that are read once for all their answers.

    flat    inputs [B, T]  prompt + answer, less the last token
    shared  prompts [P, L] less their last token, into the cache of keys and values -> inputs [B, T] that token + answer, less the
            answer's last, behind the cache's row of their prompt

Gradients flow through the cache, so both give the same to rounding; P prompts of L tokens cost P L in place of B L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class TokenRow(NamedTuple):
    """A prompt [P] and an answer to it [R], token ids, int64 on the CPU; neither is empty."""

    prompt: torch.Tensor
    answer: torch.Tensor


class Prompts(NamedTuple):
    """The text before the inputs: `ids_PL` right-padded, the prompt `of_B` of each row, `mask_BC` over cache and inputs (1
    where a token counts), and the place of each input in its text, `positions_BT`."""

    ids_PL: torch.Tensor
    of_B: torch.Tensor
    mask_BC: torch.Tensor
    positions_BT: torch.Tensor


class TokenBatch(NamedTuple):
    """`inputs_BT` that a model reads, the tokens `targets_BK` that its last K outputs are about, and where among these K the
    answer's tokens are, `answer_BR`: past an answer's end its last one.

    Rows are right-padded with any valid id: attention is causal and positions count from the left, so no real token sees a pad.
    """

    inputs_BT: torch.Tensor
    targets_BK: torch.Tensor
    answer_BR: torch.Tensor
    prompts: Prompts | None = None


def make_batch(rows: Sequence[TokenRow], device: torch.device, share: bool = False) -> TokenBatch:
    """The batch of some answers; with `share`, prompts are read once where that at least halves their number."""
    prompts = {row.prompt.numpy().tobytes(): row.prompt for row in rows}
    if share and 2 * len(prompts) <= len(rows) and min(map(len, prompts.values())) > 1:
        return _shared(rows, prompts, device)
    offsets_B = torch.tensor([len(row.prompt) - 1 for row in rows])
    start = int(offsets_B.min())
    ids_BT = pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    answer_BR = (offsets_B - start)[:, None] + _places(rows)
    return TokenBatch(ids_BT[:, :-1].to(device), ids_BT[:, start + 1 :].to(device), answer_BR.to(device))


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the state of `model` after a prompt is a plain cache of keys and values: no sliding window, no recurrent state."""
    layers = DynamicCache(config=model.config).layers
    return not getattr(model, "_is_stateful", False) and all(type(layer) is DynamicLayer for layer in layers)


def read(model: Any, batch: TokenBatch, **options: Any) -> Any:
    """The outputs of `model` on the inputs of `batch`; `options` are for the model."""
    prompts = batch.prompts
    if prompts is None:
        return model(input_ids=batch.inputs_BT, use_cache=False, **options)
    cache = DynamicCache()
    last = {"logits_to_keep": 1} if "logits_to_keep" in options else {}  # of a prompt only the cache is used
    model(input_ids=prompts.ids_PL, past_key_values=cache, use_cache=True, **last)
    cache.batch_select_indices(prompts.of_B)
    return model(
        input_ids=batch.inputs_BT,
        attention_mask=prompts.mask_BC,
        position_ids=prompts.positions_BT,
        past_key_values=cache,
        use_cache=True,
        **options,
    )


def _shared(rows: Sequence[TokenRow], prompts: Mapping[bytes, torch.Tensor], device: torch.device) -> TokenBatch:
    numbers = {key: number for number, key in enumerate(prompts)}
    ids_PL = pad_sequence([prompt[:-1] for prompt in prompts.values()], batch_first=True)
    ids_BT = pad_sequence([torch.cat([row.prompt[-1:], row.answer]) for row in rows], batch_first=True)
    before_B = torch.tensor([len(row.prompt) - 1 for row in rows])
    steps_T = torch.arange(ids_BT.shape[1] - 1)
    inside_BL = (torch.arange(ids_PL.shape[1]) < before_B[:, None]).long()
    behind = Prompts(
        ids_PL=ids_PL.to(device),
        of_B=torch.tensor([numbers[row.prompt.numpy().tobytes()] for row in rows], device=device),
        mask_BC=torch.cat([inside_BL, torch.ones(len(rows), len(steps_T), dtype=torch.long)], dim=1).to(device),
        positions_BT=(before_B[:, None] + steps_T).to(device),
    )
    return TokenBatch(ids_BT[:, :-1].to(device), ids_BT[:, 1:].to(device), _places(rows).to(device), behind)


def _places(rows: Sequence[TokenRow]) -> torch.Tensor:
    """[B, R]: 0, 1, ... up to each answer's last token, which is repeated."""
    lengths_B = torch.tensor([len(row.answer) for row in rows])
    return torch.minimum(torch.arange(int(lengths_B.max())), lengths_B[:, None] - 1)
