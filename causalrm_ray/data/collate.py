"""Rows of a log as the batches a scorer reads: features [B, D], or token ids [B, T] padded on the right."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from causalrm_ray.checks import check_finite


class FeatureRows:
    """Rows that are already numbers, such as the last-token states of a frozen backbone.

    `features` [N, D], finite. Raises ValueError for another rank or a value that is not finite.
    """

    def __init__(self, features: Tensor) -> None:
        if features.ndim != 2:
            raise ValueError(f"features must be [N, D], got shape {tuple(features.shape)}")
        check_finite("features", features)
        self.features = features

    def __len__(self) -> int:
        return self.features.shape[0]

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """{"features": [B, D]} of the rows `index` [B]."""
        return {"features": self.features.index_select(0, index)}


class TokenRows:
    """Rows of token ids of unequal length: stored end to end in four bytes each, padded on the right only as a batch is made.

    `ids` [T] are those of all rows, one after another, `lengths` [N] >= 1 the rows' shares of them; `pad_id` fills the tail.
    Raises ValueError that names an empty row.
    """

    def __init__(self, ids: Tensor, lengths: Tensor, pad_id: int) -> None:
        if bool((lengths < 1).any()):
            raise ValueError(f"rows must hold at least one token, got none in row {int((lengths < 1).nonzero()[0])}")
        self.pad_id = pad_id
        self.lengths = lengths.long()
        if int(self.lengths.sum()) != len(ids):
            raise ValueError(f"lengths must add up to the ids, got {int(self.lengths.sum())} and {len(ids)}")
        self._flat = ids.to(torch.int32)
        self._start = self.lengths.cumsum(0) - self.lengths

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad_id: int) -> TokenRows:
        """The same from N sequences of ids."""
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return cls(ids, torch.tensor([len(row) for row in rows], dtype=torch.long), pad_id)

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def take(self, index: Tensor) -> TokenRows:
        """The rows `index` [M], over the same ids in memory."""
        rows = copy.copy(self)
        rows.lengths, rows._start = self.lengths[index], self._start[index]
        return rows

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """{"input_ids": [B, T], "lengths": [B]} of the rows `index` [B]; T is the longest of them."""
        lengths = self.lengths[index]
        position_T = torch.arange(int(lengths.max()) if len(index) else 0)
        inside_BT = position_T < lengths[:, None]
        ids_BT = self._flat[(self._start[index][:, None] + position_T).clamp(max=len(self._flat) - 1)].long()
        return {"input_ids": ids_BT.masked_fill(~inside_BT, self.pad_id), "lengths": lengths}
