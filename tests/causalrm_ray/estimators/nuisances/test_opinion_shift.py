"""What opinions do besides features: found where all else has nothing to do with them, and trusted no further than chance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.nuisances.opinion_shift import BLOCK, opinion_shift

ROWS = 20_000
ONE = torch.zeros(ROWS, dtype=torch.long)  # a stratum of all rows


def world(c: float, popularity: Tensor, opinion: Tensor) -> tuple[Tensor, Tensor]:
    """P(o = 1 | x) and P(r* = 1 | x, o = 1) of P(o = 1 | x, r*) = popularity e^(c r*)."""
    feedback = popularity * (1 + math.expm1(c) * opinion)
    return feedback, popularity * math.exp(c) * opinion / feedback


@pytest.mark.parametrize("c", [-1.0, 0.0, 1.1])
def test_the_shift_is_found_where_the_rest_has_nothing_to_do_with_opinions(c: float) -> None:
    states = torch.randn(ROWS, 50, generator=torch.Generator().manual_seed(0)).double()
    opinion, popularity = torch.sigmoid(states[:, 0]), 0.05 * torch.exp(0.5 * states[:, 1])
    found = opinion_shift(*world(c, popularity, opinion), states, torch.arange(ROWS), ONE)
    assert opinion_shift(*world(c, popularity, opinion), states, torch.arange(ROWS)) == replace(found, used=0.0)
    # Cov[states_1 / 2, opinion] is not exactly 0 in a sample: its error over Var[opinion], 0.043, is 0.5 / sqrt(0.043 ROWS).
    assert found.found == pytest.approx(c, abs=4 * 0.5 / math.sqrt(0.043 * ROWS) + 1e-6)
    assert found.used == pytest.approx(found.found * max(0.0, 1 - 4 / found.strength**2) if c else 0.0, abs=1e-9)
    assert found.strength < 2 if c == 0 else found.strength > 2  # one of 50 directions is a seventh by chance: 2.7 at most


def test_no_shift_is_found_where_none_explains_the_rates_and_none_beyond_a_probability() -> None:
    generator = torch.Generator().manual_seed(6)
    x, noise = torch.randn(2, ROWS, generator=generator).double()
    seen, states = torch.sigmoid(0.3 * x), torch.stack([x, noise], 1)  # rates vary more with x than opinions, whatever c is
    rate = 0.1 * torch.exp(0.8 * x + 0.3 * noise)
    assert opinion_shift(rate, seen, states, torch.arange(ROWS)).found == 0
    opinion, states = torch.sigmoid(x), torch.cat([states, torch.randn(ROWS, 30, generator=generator).double()], 1)
    feedback, seen = world(2.0, torch.full((ROWS,), 0.13).double(), opinion)  # P(o = 1 | r* = 1) = 0.96
    found = opinion_shift(feedback, seen, states, torch.arange(ROWS), ONE)
    shifted = torch.sigmoid(torch.logit(seen) - found.used)
    assert float((feedback * seen / shifted <= 1).double().mean()) >= 0.99
    assert 0.5 < found.used <= 2.05


def test_strength_counts_what_directions_of_the_states_reach_by_chance() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2000, 8, generator=generator).double() @ torch.diag(torch.arange(1.0, 9.0)).double()
    opinion = torch.sigmoid(states[:, 7] / 4 + states[:, 2] / 3)
    feedback, seen = world(0.0, 0.1 * torch.exp(0.05 * states[:, 7]), opinion)
    found = opinion_shift(feedback, seen, states, torch.arange(2000))
    e, log_rate = torch.sigmoid(torch.logit(opinion) - found.found), feedback.log()
    drawn = (states - states.mean(0)) @ torch.randn(8, 4000, generator=generator).double()
    covariance = (drawn * (e - e.mean())[:, None]).mean(0)
    chance = covariance.square().mean() / drawn.square().mean() / e.var() + 1 / 2000
    correlation = torch.corrcoef(torch.stack([e, log_rate]))[0, 1]
    # Of 4,000 squares of Gaussians the mean is known to 2.2 %; a root of it to half of that, and three of these errors are 4 %.
    assert found.strength == pytest.approx(float(abs(correlation) / chance.sqrt()), rel=0.04)


def test_levels_of_strata_say_nothing_of_opinions() -> None:
    states = torch.randn(ROWS, 30, generator=torch.Generator().manual_seed(2)).double()
    opinion = torch.sigmoid(2 * states[:, 0])
    strata = (states[:, 0] > 0).long()  # the better half of the answers is shown on a page that asks for feedback
    feedback, seen = world(0.0, 0.05 * torch.exp(1.5 * strata.double()), opinion)
    everyone = torch.arange(ROWS)
    assert opinion_shift(feedback, seen, states, everyone).found > 1
    assert abs(opinion_shift(feedback, seen, states, everyone, strata).found) < 0.02


def test_a_log_whose_rows_are_alike_shows_nothing_and_few_units_show_little() -> None:
    states = torch.randn(500, 4, generator=torch.Generator().manual_seed(3)).double()
    everyone = torch.arange(500)
    assert opinion_shift(torch.full((500,), 0.2), torch.full((500,), 0.6), states, everyone, ONE[:500]).used == 0
    opinion = torch.sigmoid(states[:, 0])
    feedback, seen = world(1.0, torch.full((500,), 0.1).double(), opinion)
    many, few = (opinion_shift(feedback, seen, states, everyone, units=units) for units in (500, 3))
    assert few.strength < many.strength


def test_rows_and_blocks_are_those_asked_for() -> None:
    states = torch.randn(BLOCK + 1000, 3, generator=torch.Generator().manual_seed(4)).double()
    rows = torch.arange(500, BLOCK + 700)
    opinion = torch.sigmoid(states[rows, 0])
    feedback, seen = world(1.0, torch.full((len(rows),), 0.1).double(), opinion)
    picked = opinion_shift(feedback, seen, states, rows)
    alone = opinion_shift(feedback, seen, states[rows], torch.arange(len(rows)))
    assert (picked.found, picked.strength) == (pytest.approx(alone.found), pytest.approx(alone.strength))
