"""Trees as tensors: what scikit-learn's predict, through the noise channel, and again from JSON and tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from causalrm_ray.models.scorers.saved_heads import describe, rebuild
from causalrm_ray.models.scorers.trees import BoostedScorer, from_boosting
from causalrm_ray.types import NoiseRates

RATES = NoiseRates(0.2, 0.1)


def models() -> tuple[Tensor, list[HistGradientBoostingClassifier]]:
    """Features [N, D], and members of different numbers of trees and leaves; thresholds lie between rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4)).astype(np.float32)
    y = (rng.random(500) < 1 / (1 + np.exp(-3 * x[:, 0] * x[:, 1]))).astype(int)
    found = [
        HistGradientBoostingClassifier(max_iter=trees, max_leaf_nodes=leaves).fit(x, y) for trees, leaves in ((7, 9), (1, 2))
    ]
    return torch.from_numpy(x), found


def test_members_say_what_scikit_learn_says() -> None:
    x, found = models()
    new = torch.cat([x, 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1))])
    scorer = from_boosting(found, RATES)
    assert scorer.value.shape[:2] == (2, 7)
    expected = np.stack([model.predict_proba(new.numpy())[:, 1] for model in found], axis=1)
    torch.testing.assert_close(scorer.feedback(new), torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_opinions_are_what_the_noise_made_feedback_of_and_are_averaged() -> None:
    x, found = models()
    scorer = from_boosting(found, RATES)
    said = scorer.feedback(x)
    opinion = ((said - 0.1) / 0.7).clamp(1e-5, 1 - 1e-5)
    torch.testing.assert_close(torch.sigmoid(scorer.opinions(x).logits_BK).double(), opinion, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.sigmoid(scorer(features=x)).double(), opinion.mean(1), atol=1e-6, rtol=1e-5)
    scorer.add(x[:2], torch.tensor([-1.0, 0.0]))  # the mean: trees have no linear part
    torch.testing.assert_close(scorer.opinions(x).logits_BK.double(), torch.logit(opinion) - 0.5, atol=1e-3, rtol=1e-4)


def test_a_folder_rebuilds_them_without_pickle() -> None:
    x, found = models()
    scorer = from_boosting(found, RATES)
    again = rebuild(json.loads(json.dumps(describe(scorer))))
    assert isinstance(again, BoostedScorer)
    again.load_state_dict(scorer.state_dict())
    assert torch.equal(again(features=x), scorer(features=x))
    with pytest.raises(ValueError, match="BoostedScorer"):
        rebuild({"type": "Trees"})


def test_a_folder_whose_trees_run_in_circles_ends() -> None:
    x, found = models()
    scorer = from_boosting(found, RATES)
    scorer.left.zero_()
    scorer.right.zero_()
    scorer.left[:, :, 0] = scorer.right[:, :, 0] = 1
    assert scorer(features=x).isfinite().all()
