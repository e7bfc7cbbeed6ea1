"""Strata of observed traits, and who gives feedback in each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.strata import OTHER, length_buckets, selection_by_stratum, stratify
from causalrm_ray.types import NoiseRates

RATES = NoiseRates(0.2, 0.1)
NAMES = ("web", "phone", "mail")
LIKED, DISLIKED = (0.4, 0.1, 0.2), (0.1, 0.3, 0.2)


def world(seed: int, rows: int = 12000) -> tuple[Tensor, Observations, Tensor]:
    """Calibrated logits of P(r* = 1 | x), feedback that depends on the opinion and the stratum, and the strata."""
    generator = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(rows, generator=generator)
    strata = torch.randint(len(NAMES), (rows,), generator=generator)
    liked = torch.rand(rows, generator=generator) < torch.sigmoid(f)
    chance = torch.where(liked, torch.tensor(LIKED)[strata], torch.tensor(DISLIKED)[strata])
    o = torch.rand(rows, generator=generator) < chance
    flipped = torch.rand(rows, generator=generator) < torch.where(liked, RATES.rho_01, RATES.rho_10)
    return f, Observations(o.float(), (liked ^ flipped).float()), strata


def test_selection_of_each_stratum_is_found() -> None:
    found = selection_by_stratum(*world(0, 60000), NAMES, RATES, draws=50)
    for name, liked, disliked in zip(NAMES, LIKED, DISLIKED, strict=True):
        one = found[name]
        assert abs(one.liked - liked) < 3 * (one.liked_interval[1] - one.liked_interval[0]) / 3.92
        assert abs(one.disliked - disliked) < 3 * (one.disliked_interval[1] - one.disliked_interval[0]) / 3.92
        assert one.liked_interval[1] - one.liked_interval[0] < 0.08
        assert one.warnings == ()
    assert [found[name].differ for name in NAMES] == [True, True, False]
    assert sum(one.rows for one in found.values()) == 60000


def test_intervals_cover_the_truth() -> None:
    hits = []
    for seed in range(15):
        found = selection_by_stratum(*world(seed), NAMES, RATES, draws=100)
        for name, liked, disliked in zip(NAMES, LIKED, DISLIKED, strict=True):
            one = found[name]
            hits.append(one.liked_interval[0] <= liked <= one.liked_interval[1])
            hits.append(one.disliked_interval[0] <= disliked <= one.disliked_interval[1])
    # 3 standard errors, and 1.5 points that a hundred draws take from an interval's ends
    assert abs(sum(hits) / len(hits) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / len(hits)) + 0.015


def test_estimate_is_the_maximum_of_the_likelihood() -> None:
    """The log-likelihood, row by row in float64, has no slope at the estimate, but for the bins."""
    f, log, strata = world(1)
    found = selection_by_stratum(f, log, torch.zeros_like(strata), ["all"], RATES, draws=2)["all"]
    on = torch.tensor([found.liked, found.disliked], dtype=torch.float64, requires_grad=True)
    sure = torch.sigmoid(f.double())
    liked, disliked = sure * on[0], (1 - sure) * on[1]
    up = liked * (1 - RATES.rho_01) + disliked * RATES.rho_10
    down = liked * RATES.rho_01 + disliked * (1 - RATES.rho_10)
    value = torch.where(log.o == 0, 1 - liked - disliked, torch.where(log.r == 1, up, down)).log().sum()
    gradient = torch.autograd.grad(value, on, create_graph=True)[0]
    curvature = torch.stack([torch.autograd.grad(slope, on, retain_graph=True)[0] for slope in gradient])
    step = torch.linalg.solve(-curvature, gradient.detach())
    error = torch.linalg.inv(-curvature).diagonal().sqrt()
    assert (step.abs() < 0.05 * error).all()  # the maximum lies within a twentieth of a standard error


def test_what_the_log_does_not_show_is_said() -> None:
    f, log, strata = world(2, 300)
    assert "interval too wide" in selection_by_stratum(f, log, strata, NAMES, RATES)["mail"].warnings[0]
    silent = Observations(torch.where(strata == 1, 0.0, log.o), log.r)
    one = selection_by_stratum(f, silent, strata, NAMES, RATES)["phone"]
    assert one.warnings == (f"no feedback on any of {int((strata == 1).sum())} rows: selection is unknown here",)
    assert not one.differ
    with pytest.raises(ValueError, match=r"strata must be in 0..1 and not empty, got \[0, 1, 2\]"):
        selection_by_stratum(f, log, strata, NAMES[:2], RATES)


def test_an_empty_stratum_spoils_no_other() -> None:
    f, log, strata = world(3, 3000)
    found = selection_by_stratum(f, log, strata, [*NAMES, "none"], RATES)
    assert found["none"].rows == 0
    assert found["web"] == selection_by_stratum(f, log, strata, [*NAMES, "none"], RATES)["web"]
    assert math.isfinite(found["web"].ratio)


def test_strata_cross_the_traits_and_merge_the_rare() -> None:
    traits = [{"surface": "web", "style": "long"}] * 6 + [{"surface": "web", "style": "short"}] * 5 + [{"surface": "phone"}] * 2
    log = Observations(torch.ones(13), torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]))
    strata, names = stratify(traits, log, least=2)
    assert names == ("style=long, surface=web", "style=short, surface=web", OTHER)
    assert strata.tolist() == [0] * 6 + [1] * 5 + [2] * 2
    assert stratify(traits, log, most=2, least=0)[1] == ("style=long, surface=web", OTHER)
    assert stratify(traits, log, most=3, least=0)[1][2] == "style=?, surface=phone"
    assert stratify([{}] * 13, log, least=0)[1] == ("all",)
    strata, names = stratify(traits, log, least=100)
    assert names == (OTHER,)
    assert strata.tolist() == [0] * 13


def test_strata_that_cannot_be_are_refused() -> None:
    log = Observations(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="most must be at least 1 and least at least 0, got 0 and 20"):
        stratify([{}, {}], log, most=0)
    with pytest.raises(ValueError, match=r"rows must match, got \{'traits': 1, 'o': 2\}"):
        stratify([{}], log)


def test_length_buckets_hold_equal_shares() -> None:
    place, names = length_buckets(torch.tensor([1, 2, 3, 4, 5, 6]))
    assert (place.tolist(), names) == ([0, 0, 1, 1, 2, 2], ("up to 2", "3 to 4", "over 4"))
    place, names = length_buckets(torch.tensor([7, 7, 7]))
    assert (place.tolist(), names) == ([0, 0, 0], ("any",))
    place, names = length_buckets(torch.tensor([5, 1]), buckets=1)
    assert (place.tolist(), names) == ([0, 0], ("any",))
    with pytest.raises(ValueError, match="buckets must be at least 1 and lengths at least 0, got 0 and 1"):
        length_buckets(torch.tensor([1]), buckets=0)
