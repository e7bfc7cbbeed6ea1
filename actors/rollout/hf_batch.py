"""Batches of requests on a transformers model, one token a step.

    waiting rows --prefill--> running rows --one token a step--> finished
         ^ admitted when half of ROWS are free

Keys and values of the running rows are kept right-aligned: pads are on the left and masked, and positions count a row's own
tokens. A row draws from uniform numbers that its request's seed alone determines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from causalrm_ray.models.sampling import draw, sampling_distribution
from causalrm_ray.types import Sampling, StopReason

ROWS = 128  # most rows of a batch that run at once
PREFILL_TOKENS = 16_384  # most tokens, pads included, of one prefill


@dataclass
class Row:
    """A request that waits, runs or has finished."""

    id: str
    prompt_ids: Sequence[int]
    seed: int
    stream: Any  # turns tokens into text where texts may stop the answer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights that wrote each token
    uniforms: Sequence[float] = ()  # one per token that may come, drawn when it begins to run
    text: str = ""
    stop_reason: StopReason | None = None  # once it has finished


class _Context:
    """Keys and values of some rows up to their next token, right-aligned."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
        """Read the rows' tokens; `logits_BV` is then about the token that follows each."""
        self._model = model
        self._cache: Any = DynamicCache()
        width = max(len(row) for row in rows)
        pads = [width - len(row) for row in rows]
        ids_BT = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)], device=model.device)
        self._mask_BK = (torch.arange(width) >= torch.tensor(pads)[:, None]).long().to(model.device)
        self.logits_BV = self._forward(ids_BT)

    def read(self, token_ids: Sequence[int]) -> None:
        """One more token of each row."""
        ids_B1 = torch.tensor(token_ids, device=self._mask_BK.device)[:, None]
        self._mask_BK = torch.cat([self._mask_BK, torch.ones_like(ids_B1)], dim=1)
        self.logits_BV = self._forward(ids_B1)

    def join(self, other: _Context) -> None:
        """Put the rows of `other` below these."""
        width = max(self._mask_BK.shape[1], other._mask_BK.shape[1])

        def stack(mine: torch.Tensor, others: torch.Tensor, trailing: int) -> torch.Tensor:
            axis = mine.dim() - 1 - trailing
            pads = [(0, 0) * trailing + (width - part.shape[axis], 0) for part in (mine, others)]
            return torch.cat([torch.nn.functional.pad(part, pad) for part, pad in zip((mine, others), pads, strict=True)])

        for layer, others in zip(self._cache.layers, other._cache.layers, strict=True):
            layer.keys, layer.values = stack(layer.keys, others.keys, 1), stack(layer.values, others.values, 1)
        self._mask_BK = stack(self._mask_BK, other._mask_BK, 0)
        self.logits_BV = torch.cat([self.logits_BV, other.logits_BV])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the pads that none of them needs."""
        kept = torch.tensor(rows, device=self._mask_BK.device)
        mask_BK = self._mask_BK[kept]
        first = int(mask_BK.any(dim=0).int().argmax())
        self._mask_BK, self.logits_BV = mask_BK[:, first:], self.logits_BV[kept]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept][:, :, first:], layer.values[kept][:, :, first:]

    def _forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        positions_BK = (self._mask_BK.cumsum(dim=1) - 1).clamp(min=0)
        outputs = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BK,
            position_ids=positions_BK[:, -ids_BT.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]


class Batch:
    """The rows of one submit."""

    def __init__(self, rows: Sequence[Row], sampling: Sampling, stop_ids: frozenset[int], tokenizer: Any) -> None:
        self._waiting = deque(rows)
        self._running: list[Row] = []
        self._context: _Context | None = None
        self._sampling, self._stop_ids, self._tokenizer = sampling, stop_ids, tokenizer
        self._texts = [end for end in sampling.stop if isinstance(end, str)]

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def forget_context(self) -> None:
        """Recompute all keys and values at the next step."""
        self._context = None

    def abort(self, ids: frozenset[str]) -> None:
        """Drop these rows."""
        self._waiting = deque(row for row in self._waiting if row.id not in ids)
        self._keep([index for index, row in enumerate(self._running) if row.id not in ids])

    def step(self, model: PreTrainedModel, version: int) -> list[tuple[str, Row]]:
        """One token for every running row; those that finished with it."""
        context = self._context = self._advance(model)
        log_distribution_BV = sampling_distribution(context.logits_BV, self._sampling)
        if self._sampling.temperature == 0:
            tokens_B = log_distribution_BV.argmax(dim=-1)
        else:
            uniforms = [row.uniforms[len(row.token_ids)] for row in self._running]
            tokens_B = draw(log_distribution_BV, torch.tensor(uniforms, dtype=torch.float64, device=model.device))
        logprobs = log_distribution_BV.gather(-1, tokens_B[:, None])[:, 0].tolist()
        running = self._running
        for row, token, logprob in zip(running, tokens_B.tolist(), logprobs, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(version)
            row.stop_reason = self._reason_to_stop(row)
        self._keep([index for index, row in enumerate(running) if row.stop_reason is None])
        return [(row.id, row) for row in running if row.stop_reason is not None]

    def _advance(self, model: PreTrainedModel) -> _Context:
        """The context of all rows that run, those that now begin included."""
        context, unread = self._context, [] if self._context else self._running
        if context:
            context.read([row.token_ids[-1] for row in self._running])
        admitted: list[Row] = []
        if len(self._running) <= ROWS // 2:
            admitted = [self._waiting.popleft() for _ in range(min(ROWS - len(self._running), len(self._waiting)))]
        for row in admitted:
            row.uniforms = _uniforms(row.seed, self._sampling.max_new_tokens)
        for rows in _prefills([[*row.prompt_ids, *row.token_ids] for row in [*unread, *admitted]]):
            part = _Context(model, rows)
            if context:
                context.join(part)
            else:
                context = part
        self._running = self._running + admitted
        assert context is not None, "a batch without rows is not stepped"
        return context

    def _keep(self, kept: Sequence[int]) -> None:
        if len(kept) == len(self._running):
            return
        self._running = [self._running[index] for index in kept]
        if not self._running:
            self._context = None
        elif self._context:
            self._context.keep(kept)

    def _reason_to_stop(self, row: Row) -> Literal["stop", "length"] | None:
        if row.token_ids[-1] in self._stop_ids:
            return "stop"
        if self._texts:
            new = row.stream.step(self._tokenizer, row.token_ids[-1]) or ""
            row.text += new
            recent = len(new) + max(len(end) for end in self._texts) - 1
            if new and any(end in row.text[-recent:] for end in self._texts):
                return "stop"
        return "length" if len(row.token_ids) == self._sampling.max_new_tokens else None


def _uniforms(seed: int, count: int) -> list[float]:
    """The numbers in [0, 1) that one request draws with, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def _prefills(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Consecutive rows, as many at once as PREFILL_TOKENS allows."""
    if rows:
        size = max(1, PREFILL_TOKENS // max(len(row) for row in rows))
        yield from (rows[first : first + size] for first in range(0, len(rows), size))
