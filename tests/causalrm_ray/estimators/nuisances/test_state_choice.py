"""Which states tell most of feedback: by held-out outcomes, checked against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances import state_choice
from causalrm_ray.estimators.nuisances.state_choice import choose_states, held_out_loss
from causalrm_ray.models.states.pooled import STATES
from causalrm_ray.types import StatesName


def log(seed: int, rows: int = 1200, by_opinion: bool = True) -> tuple[Tensor, Observations]:
    """An opinion [N] of each row, and feedback that depends on it, or that only says it."""
    generator = torch.Generator().manual_seed(seed)
    opinion = torch.randn(rows, generator=generator)
    liked = torch.rand(rows, generator=generator) < torch.sigmoid(2 * opinion)
    share = torch.where(liked, 0.6, 0.25) if by_opinion else torch.full((rows,), 0.5)
    o = (torch.rand(rows, generator=generator) < share).float()
    r = torch.where(torch.rand(rows, generator=generator) < 0.1, ~liked, liked).float()
    return opinion, Observations(o, r)


def states(opinion: Tensor, noise: float, seed: int, width: int = 24) -> Tensor:
    """States [N, D] in which the opinion is one direction, under noise, beside others that say nothing."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(width, generator=generator)
    seen = opinion + noise * torch.randn(len(opinion), generator=generator)
    return seen[:, None] * direction + torch.randn(len(opinion), width, generator=generator)


@pytest.mark.parametrize("by_opinion", [True, False])
def test_the_states_that_know_most_of_the_opinion_are_chosen_without_a_clean_label(by_opinion: bool) -> None:
    right = 0
    for seed in range(5):
        opinion, observations = log(seed, by_opinion=by_opinion)
        noise: dict[StatesName, float] = {"final-last": 2.0, "final-mean": 1.0, "middle-last": 3.0, "middle-mean": 0.3}

        def given(name: StatesName, rows: Tensor, opinion: Tensor = opinion, noise=noise, seed: int = seed) -> Tensor:
            return states(opinion, noise[name], seed)[rows]

        choice = choose_states(given, observations, torch.arange(0, 1200, 5), seed)
        right += choice.states == "middle-mean"
        assert set(choice.losses) == set(STATES)
    assert right >= 4


def test_the_loss_is_that_of_scikit_learns_softmax_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    opinion, observations = log(0, 300)
    x, outcome = states(opinion, 0.5, 0), (observations.o * (1 + observations.r)).long()
    fold = torch.arange(300) % 3
    monkeypatch.setattr(state_choice, "PENALTIES", (0.1,))
    scaled = ((x - x.mean(0)) / x.var(0, unbiased=False).sqrt() / x.shape[1] ** 0.5).double().numpy()
    total = 0.0
    for number in range(3):
        out = (fold == number).numpy()
        strength = 0.5 / (0.1 / x.shape[1] * (~out).sum())  # C weighs the sum of losses, against half the square
        model = LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(scaled[~out], outcome.numpy()[~out])
        total -= float(np.log(model.predict_proba(scaled[out])[np.arange(out.sum()), outcome.numpy()[out]]).sum())
    assert held_out_loss(x, outcome, fold) == pytest.approx(total / 300, abs=2e-4)


def test_a_large_log_is_chosen_by_a_sample_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    opinion, observations = log(0, 400)
    seen: list[int] = []

    def given(name: StatesName, rows: Tensor) -> Tensor:
        assert not set(rows.tolist()) & set(range(80)), "held out"
        return states(opinion, 0.3, 0)[rows]

    def counted(features: Tensor, outcome: Tensor, fold: Tensor) -> float:
        seen.extend((int((outcome == 0).sum()), int((outcome > 0).sum())))
        return 0.0

    monkeypatch.setattr(state_choice, "MOST", 50)
    monkeypatch.setattr(state_choice, "held_out_loss", counted)
    choose_states(given, observations, torch.arange(80), 0)
    assert seen == [50, 50] * 4
