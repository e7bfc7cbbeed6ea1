"""Temperatures by hand, and heads that are given them."""

from __future__ import annotations

import math

import pytest
import torch

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.methods.observed import cool
from causalrm_ray.estimators.nuisances.calibration import temperature
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import FeatureScorer


@pytest.mark.parametrize("sure", [0.5, 3.0, 12.0])
def test_three_in_four_right_is_a_logit_of_log_three(sure: float) -> None:
    logit = torch.tensor([sure, sure, sure, sure, -sure, -sure, -sure, -sure])
    label = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert temperature(logit, label) == pytest.approx(sure / math.log(3), rel=1e-3)


def test_certain_rows_end_at_the_bound_and_rows_must_match() -> None:
    assert temperature(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(math.exp(-4), rel=1e-3)
    with pytest.raises(ValueError, match="rows must match"):
        temperature(torch.zeros(2), torch.zeros(3))


def test_a_head_is_divided_by_the_temperature_of_held_out_feedback() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    r = (torch.rand(400, generator=generator) < torch.sigmoid(x[:, 0])).float()
    o = (torch.arange(400) % 3 > 0).float()
    scorer = FeatureScorer(3, ())
    with torch.no_grad():
        scorer.head.weight.copy_(torch.tensor([[8.0, 0.0, 0.0]]))
        scorer.head.bias.fill_(0.5)
    inputs, heldout = FeatureRows(x), torch.arange(200, 400)
    task = FitTask(
        lambda: scorer, inputs, Observations(o, r), Nuisances(), torch.arange(200), heldout, FitSettings(1, 0.1, 8), bce
    )
    before = predict(scorer, inputs)
    found = cool(task, scorer)
    seen = heldout[o[heldout] == 1]
    assert found == pytest.approx(temperature(before[seen], r[seen]))
    assert found > 3  # the truth is 8
    torch.testing.assert_close(predict(scorer, inputs), before / found)
