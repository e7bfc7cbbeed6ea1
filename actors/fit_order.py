"""What a reward fit is told: light to import, for Ray Train's controller reads it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from causalrm_ray.config import RewardConfig

REPORT = "report.json"
LOSS = "bce"  # cross-entropy on the logit
BATCH_SIZE = 64  # rows per optimizer step over all workers, of reward and propensity models
PROPENSITY_EPOCHS = 2  # most passes: all impressions teach it, the reward model only those with feedback


@dataclass(frozen=True, eq=False)
class FitOrder:
    """All that a worker needs to know.

    Paths must be readable from every worker. `start` is the model that fits begin from, under a blank head;
    `serving` (with `serving_version`) is measured on the same held-out rows. `propensity` [N], `clean_labels` [N].
    """

    snapshot: Path
    backbone: str
    start: str
    serving: str | None
    serving_version: int
    propensity: np.ndarray
    clean_labels: np.ndarray | None
    methods: Sequence[str]
    config: RewardConfig
    max_length: int
    seed: int
