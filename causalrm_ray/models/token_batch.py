"""Answers as a model reads them: every row whole, or behind prompts that are read once for all their answers.

    flat    inputs [B, T]  prompt + answer, less the last token
    shared  prompts [P, L] less their last token, into the cache of keys and values -> inputs [B, T] that token + answer, less the
            answer's last, behind the cache's row of their prompt

Gradients flow through the cache, so both give the same to rounding; P prompts of L tokens cost P L in place of B L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from causalrm_ray.types import Completion


class Prompts(NamedTuple):
    """What stands before the inputs: `ids_PL` right-padded, the prompt `of_B` of each row, `mask_BC` over cache and inputs (1
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


def make_batch(completions: Sequence[Completion], device: torch.device, share: bool = False) -> TokenBatch:
    """The batch of some answers; with `share`, prompts are read once where that at least halves their number."""
    prompts = list(dict.fromkeys(completion.prompt.token_ids for completion in completions))
    if share and 2 * len(prompts) <= len(completions) and min(map(len, prompts)) > 1:
        return _shared(completions, prompts, device)
    rows = [completion.prompt.token_ids + completion.token_ids for completion in completions]
    offsets_B = torch.tensor([len(completion.prompt.token_ids) - 1 for completion in completions])
    start = int(offsets_B.min())
    ids_BT = _pad(rows)
    answer_BR = (offsets_B - start)[:, None] + _places(completions)
    return TokenBatch(ids_BT[:, :-1].to(device), ids_BT[:, start + 1 :].to(device), answer_BR.to(device))


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether all that `model` knows of a prompt is in a plain cache of keys and values: no window, no state."""
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


def _shared(completions: Sequence[Completion], prompts: list[tuple[int, ...]], device: torch.device) -> TokenBatch:
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    ids_PL = _pad([prompt[:-1] for prompt in prompts])
    ids_BT = _pad([completion.prompt.token_ids[-1:] + completion.token_ids for completion in completions])
    before_B = torch.tensor([len(completion.prompt.token_ids) - 1 for completion in completions])
    steps_T = torch.arange(ids_BT.shape[1] - 1)
    inside_BL = (torch.arange(ids_PL.shape[1]) < before_B[:, None]).long()
    behind = Prompts(
        ids_PL=ids_PL.to(device),
        of_B=torch.tensor([numbers[completion.prompt.token_ids] for completion in completions], device=device),
        mask_BC=torch.cat([inside_BL, torch.ones(len(completions), len(steps_T), dtype=torch.long)], dim=1).to(device),
        positions_BT=(before_B[:, None] + steps_T).to(device),
    )
    return TokenBatch(ids_BT[:, :-1].to(device), ids_BT[:, 1:].to(device), _places(completions).to(device), behind)


def _places(completions: Sequence[Completion]) -> torch.Tensor:
    """[B, R]: 0, 1, ... up to each answer's last token, which is repeated."""
    lengths_B = torch.tensor([len(completion.token_ids) for completion in completions])
    return torch.minimum(torch.arange(int(lengths_B.max())), lengths_B[:, None] - 1)


def _pad(rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + (0,) * (length - len(row)) for row in rows])
