"""Which backbone, which of its states, in which precision, and where they are kept: light to import."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from causalrm_ray.types import StatesName, Truncation

if TYPE_CHECKING:
    from causalrm_ray.config.train import Config

STATES: tuple[StatesName, ...] = get_args(StatesName)
FORMAT = 1  # of the states' files and of what is in them


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen backbone, a folder or hub id, its digest (models.identity), which of its states a head reads, and the precision,
    torch's name, in which they are computed."""

    model: str
    digest: str
    states: StatesName
    dtype: str


def reward_backbone(config: Config, model: str, digest: str, on_gpu: bool) -> Backbone:
    """The backbone of a run's reward models: in bfloat16 on GPUs, else as model.dtype says. Which states are read is chosen at
    the first fit, unless model.states says it."""
    return Backbone(model, digest, config.model.states or "final-last", "bfloat16" if on_gpu else config.model.dtype)


def states_folder(cache: Path, backbone: Backbone, max_length: int, truncation: Truncation) -> Path:
    """Where states of a backbone are cached, below a run's `cache`: under a digest of all that they depend on besides the row."""
    parts = [FORMAT, backbone.digest, backbone.dtype, max_length, truncation]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return cache.expanduser().resolve() / "states" / key
