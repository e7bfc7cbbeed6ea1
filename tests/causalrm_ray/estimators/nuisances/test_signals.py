"""Rates by signal: right where the truth is known, and in sum the noise rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_rates import estimate_noise_rates
from causalrm_ray.estimators.nuisances.signals import signal_rates
from causalrm_ray.estimators.studies.noise_study import simulate_feedback
from causalrm_ray.types import NoiseRates

NAMES, LABELS = ("upvote", "copy", "downvote", "regenerate"), (1, 1, 0, 0)
# P(signal | r*): the disliked copy by mistake, but never upvote; the liked regenerate for variety, and rarely downvote.
LIKED, DISLIKED = (0.5, 0.3, 0.02, 0.18), (0.0, 0.1, 0.6, 0.3)


def world(seed: int, rows: int = 20000) -> tuple[Tensor, Tensor]:
    """A proxy [N] and a signal [N]: a noise-free log gives r*, of which the signal is drawn."""
    prob, clean = simulate_feedback("ramp", rows, NoiseRates(0.0, 0.0), seed)
    chance = torch.where(clean.r[:, None] == 1, torch.tensor(LIKED), torch.tensor(DISLIKED))
    signal = torch.multinomial(chance, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return prob, torch.where(clean.o == 1, signal, -1)


def test_signals_of_liked_and_disliked_are_distinguished() -> None:
    found = signal_rates(*world(0), NAMES, LABELS, draws=100)
    for name, liked, disliked in zip(NAMES, LIKED, DISLIKED, strict=True):
        assert abs(found[name].liked - liked) < 3 * math.sqrt(max(liked * (1 - liked), 0.01) / 800)
        assert abs(found[name].disliked - disliked) < 3 * math.sqrt(max(disliked * (1 - disliked), 0.01) / 800)


def test_sums_over_the_signals_of_a_label_are_the_rates() -> None:
    prob, signal = world(1)
    found = signal_rates(prob, signal, NAMES, LABELS, draws=2)
    log = Observations((signal >= 0).float(), torch.tensor(LABELS)[signal.clamp_min(0)].float())
    rates = estimate_noise_rates(prob, log, draws=2).rates
    assert found["downvote"].liked + found["regenerate"].liked == pytest.approx(rates.rho_01, abs=1e-9)
    assert found["upvote"].disliked + found["copy"].disliked == pytest.approx(rates.rho_10, abs=1e-9)
    assert sum(one.liked for one in found.values()) == pytest.approx(1.0)
    assert sum(one.rows for one in found.values()) == int(log.o.sum())


def test_intervals_cover_the_truth() -> None:
    """Signals that both kinds of users give, so that no truth lies on the border; 3 standard errors of a binomial."""
    hits = []
    for seed in range(25):
        found = signal_rates(*world(seed, 8000), NAMES, LABELS, draws=100)
        for name in ("copy", "regenerate"):
            k, one = NAMES.index(name), found[name]
            hits += [one.liked_interval[0] <= LIKED[k] <= one.liked_interval[1]]
            hits += [one.disliked_interval[0] <= DISLIKED[k] <= one.disliked_interval[1]]
    assert abs(sum(hits) / len(hits) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / len(hits))


def test_signals_that_cannot_be_read_are_named() -> None:
    prob, signal = world(2, 1000)
    with pytest.raises(ValueError, match=r"labels must be 0 or 1, one for each of 4 signals, got \[1, 1, 0\]"):
        signal_rates(prob, signal, NAMES, LABELS[:3])
    with pytest.raises(ValueError, match=r"signal must be in -1..3, got -1..4"):
        signal_rates(prob, torch.where(signal == 3, 4, signal), NAMES, LABELS)
    with pytest.raises(ValueError, match="labels of the rows with feedback must hold both classes, got 0 ones"):
        signal_rates(prob, torch.where(signal >= 0, 2, -1), NAMES, LABELS)
