"""What a frozen backbone says of an answer: its states at two depths, at the last token and averaged over the answer.

rows of token ids --backbone, once--> [B, K, D], one state for each name in STATES

    final-last    after the last layer and its norm, at the answer's last token: what a classifier's head usually reads
    final-mean    the same, averaged over the answer's tokens, its end included
    middle-last   after two thirds of the layers, at the last token
    middle-mean   the same, averaged over the answer's tokens

Early layers know words, the last ones the next token; what an answer is like is read best between them, and from all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from causalrm_ray.models.reward_model import SequenceScorer, group_sizes
from causalrm_ray.models.size import GROUP, GROUP_TOKENS
from causalrm_ray.models.states.backbone import STATES
from causalrm_ray.types import StatesName


class Row(NamedTuple):
    """Token ids of a prompt and an answer to it; neither is empty."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.prompt, *self.answer)

    @property
    def tokens(self) -> int:
        """How many ids both have."""
        return len(self.prompt) + len(self.answer)


class PooledBackbone(nn.Module):
    """The states `names` of a backbone. Where all are of the middle, the layers above it are dropped: a third less work."""

    def __init__(self, backbone: nn.Module, names: Sequence[StatesName] = STATES) -> None:
        super().__init__()
        self.backbone, self.names = backbone, tuple(names)
        layers = decoder_layers(backbone)
        depth = middle(len(layers))
        if not any(name.startswith("final") for name in names):
            del layers[depth:]
            config: Any = backbone.config
            config.num_hidden_layers = depth
        self._middle: Tensor | None = None
        layers[depth - 1].register_forward_hook(self._keep)

    @classmethod
    def from_pretrained(
        cls, model: str, names: Sequence[StatesName] = STATES, dtype: torch.dtype = torch.float32
    ) -> PooledBackbone:
        """The backbone of a folder or hub id, in evaluation mode and without gradients."""
        return cls(SequenceScorer.from_pretrained(model, dtype).model.base_model, names).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.backbone.parameters()).device

    def forward(self, input_ids: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """States [B, K, D], float32, of right-padded `input_ids` [B, T]: prompts of `starts` [B] >= 1 tokens and answers up to
        `lengths` [B] in starts + 1..T."""
        position_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        inside_BT = position_T < lengths[:, None]
        final = self.backbone(input_ids=input_ids, attention_mask=inside_BT.long(), use_cache=False).last_hidden_state
        found: dict[str, Tensor] = {"final": final, "middle": cast(Tensor, self._middle)}
        self._middle = None
        answer_BT1 = (inside_BT & (position_T >= starts[:, None])).unsqueeze(-1)
        rows_B = torch.arange(len(lengths), device=lengths.device)
        states = []
        for name in self.names:
            depth, _, pooling = name.partition("-")
            hidden_BTD = found[depth]
            if pooling == "last":
                states.append(hidden_BTD[rows_B, lengths - 1].float())
            else:
                summed = (hidden_BTD * answer_BT1).sum(1, dtype=torch.float32)
                states.append(summed / (lengths - starts)[:, None])
        return torch.stack(states, dim=1)

    def _keep(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        self._middle = output[0] if isinstance(output, tuple) else output


def middle(layers: int) -> int:
    """Of `layers` layers, after how many the middle's states are read: two thirds, and one at least."""
    return max(1, round(2 * layers / 3))


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of a language model's layers. Raises ValueError for a model that keeps them otherwise."""
    config: Any = backbone.config
    count = config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"a backbone must keep its {count} layers in one list, got {type(backbone).__name__}")


def pooled_states(backbone: PooledBackbone, rows: Sequence[Row]) -> Tensor:
    """States [N, K, D] (float32, on the CPU) of rows; see `pooled_batches`."""
    return in_order(list(pooled_batches(backbone, rows))) if rows else torch.empty(0, len(backbone.names), 0)


def in_order(batches: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """States [N, K, D] of all rows from those of batches, by the numbers of their rows."""
    numbers = torch.tensor([number for part, _ in batches for number in part])
    states = torch.cat([found for _, found in batches])
    return torch.empty_like(states).index_copy(0, numbers, states)


def pooled_batches(backbone: PooledBackbone, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of rows and their states [B, K, D] (float32, on the CPU), by batches of like length (see models.size.GROUP_TOKENS).

    Rows are ordered by length and content, so that the same set of rows gives the same bits in whatever order it comes. Raises
    ValueError for a row without a prompt or an answer.
    """
    for number, row in enumerate(rows):
        if not (len(row.prompt) and len(row.answer)):
            raise ValueError(f"row {number} must hold a prompt and an answer, got {len(row.prompt)} and {len(row.answer)} tokens")
    joined = [row.ids for row in rows]
    order = sorted(range(len(rows)), key=lambda number: (len(joined[number]), joined[number]))
    begin = 0
    for size in group_sizes([len(joined[number]) for number in order], GROUP, GROUP_TOKENS):
        part = order[begin : begin + size]
        begin += size
        ids = pad_sequence([torch.tensor(joined[number]) for number in part], batch_first=True)
        starts = torch.tensor([len(rows[number].prompt) for number in part])
        lengths = torch.tensor([len(joined[number]) for number in part])
        device = backbone.device
        with torch.inference_mode():
            states = backbone(ids.to(device), starts.to(device), lengths.to(device)).cpu()
        yield part, states.clone()
