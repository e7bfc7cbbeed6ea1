"""Label Wave's stopping: a moving average of prediction changes, its first minimum, no held-out label."""

from __future__ import annotations

import pytest
import torch

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.estimators.methods.denoising import PredictionChanges, fit_labelwave
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import FeatureScorer


def test_the_moving_average_starts_at_one_and_forgets() -> None:
    changes, rows = PredictionChanges(window=2), torch.arange(4)
    logits = [[1, 1, -1, -1], [1, 1, 1, -1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    averages = [float(changes(torch.tensor(logit).float(), rows).mean()) for logit in logits]
    assert averages == pytest.approx([1.0, (1 + 0.25) / 2, 0.25, 0.125, 0.0])


def test_held_out_labels_decide_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=generator)
    r, heldout = (x[:, 0] > 0).float(), torch.arange(90, 120)
    other = r.clone()
    other[heldout] = 1 - r[heldout]
    fits = [
        fit_labelwave(
            FitTask(
                lambda: FeatureScorer(2, (4,)),
                FeatureRows(x),
                Observations(torch.ones(120), label),
                Nuisances(),
                torch.arange(90),
                heldout,
                FitSettings(epochs=8, lr=0.05, batch_size=16, patience=2),
                bce,
            )
        )
        for label in (r, other)
    ]
    assert fits[0].report == fits[1].report
    assert fits[0].figures["changes"] == min(epoch.validation_risk for epoch in fits[0].report.epochs)
