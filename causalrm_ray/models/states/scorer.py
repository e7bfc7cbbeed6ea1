"""Reward models as a head on the states of a frozen backbone: a small folder that names the backbone.

FOLDER/  backbone.json (where it is, its digest, which state, precision)   head.json   head.safetensors   tokenizer files

A folder without backbone.json is a model of its own: a backbone with a linear head (models.reward_model).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from causalrm_ray.checkpoint import CheckpointError, read_json, write_json
from causalrm_ray.errors import InputError
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.reward_model import SequenceScorer, score_rows
from causalrm_ray.models.scorers.saved_heads import read_scorer, write_scorer
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.models.states.pooled import PooledBackbone, Row, pooled_states
from causalrm_ray.models.text import answer_template

BACKBONE, HEAD = "backbone.json", "head"


class RowScorer(Protocol):
    """What scores answers as token ids."""

    def score(self, rows: Sequence[Row]) -> Tensor:
        """Logit [N] (float32, on the CPU) of each row."""
        ...


class WholeModel:
    """A model of its own, which reads the state at the last token."""

    def __init__(self, source: str, device: str) -> None:
        self.scorer = SequenceScorer.from_pretrained(source).to(device)

    def score(self, rows: Sequence[Row]) -> Tensor:
        """Logit [N] of each row."""
        return score_rows(self.scorer, [row.ids for row in rows])


class Backbones:
    """Backbones in memory, one for all heads that read the same states of it.

    `known` are digests of models that were computed already, by folder or hub id: a large one takes its time.
    """

    def __init__(self, device: str = "cpu", known: Mapping[str, str] | None = None) -> None:
        self._device, self._digests = device, dict(known or {})
        self._loaded: dict[Backbone, PooledBackbone] = {}

    def get(self, found: Backbone, folder: Path) -> PooledBackbone:
        """The backbone of the head in `folder`. Raises CheckpointError for one that is gone, or another one."""
        if found not in self._loaded:
            try:
                digest = self._digests.get(found.model) or model_digest(found.model)
            except InputError as error:
                raise CheckpointError(f"{folder} must be read with its backbone, which is no longer at {found.model}") from error
            if digest != found.digest:
                raise CheckpointError(f"{folder} must be read with its backbone, got another one at {found.model}")
            self._digests[found.model] = digest
            dtype = getattr(torch, found.dtype)
            self._loaded[found] = PooledBackbone.from_pretrained(found.model, (found.states,), dtype).to(self._device)
        return self._loaded[found]


class HeadOnStates:
    """A saved head and its backbone, which `model` names where it was moved."""

    def __init__(self, folder: Path, backbones: Backbones, model: str | None = None) -> None:
        found, self._head = read_head(folder)
        self._backbone = backbones.get(replace(found, model=model or found.model), folder)

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> Tensor:
        """Logit [N] of each row."""
        return self._head(features=pooled_states(self._backbone, rows)[:, 0]) if rows else torch.empty(0)


def load_scorer(
    source: str | Path, device: str = "cpu", backbones: Backbones | None = None, backbone: str | None = None
) -> RowScorer:
    """The reward model in a folder, or of a hub id; heads share `backbones`, and find theirs at `backbone` if it was moved.

    Raises CheckpointError for a head whose backbone is gone or another one.
    """
    folder = Path(source)
    if is_head(folder):
        return HeadOnStates(folder, backbones or Backbones(device), backbone)
    return WholeModel(str(source), device)


def backbone_of(source: str | Path) -> str:
    """The folder or hub id of the language model in a reward model: the backbone of a head, else itself."""
    return _read_backbone(Path(source)).model if is_head(source) else str(source)


def is_head(source: str | Path) -> bool:
    """Whether a folder holds a head on states."""
    return (Path(source) / BACKBONE).exists()


def save_head(folder: Path, head: nn.Module, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a head on states to a folder. Raises ValueError for a module of another package."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = answer_template(tokenizer)
    tokenizer.save_pretrained(folder)
    write_json(folder / BACKBONE, asdict(backbone))
    write_scorer(folder / HEAD, head)


def read_head(folder: Path) -> tuple[Backbone, nn.Module]:
    """A saved head in evaluation mode, and what it reads. Raises CheckpointError for a folder that holds none."""
    return _read_backbone(folder), read_scorer(folder / HEAD)


def _read_backbone(folder: Path) -> Backbone:
    try:
        return TypeAdapter(Backbone).validate_python(read_json(folder / BACKBONE))
    except (ValidationError, OSError) as error:
        raise CheckpointError(f"{folder / BACKBONE} must name a backbone: {error}") from error
