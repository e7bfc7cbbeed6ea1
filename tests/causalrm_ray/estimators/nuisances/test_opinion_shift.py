"""What opinions do besides features: found where all else has nothing to do with them, and shrunk as far as chance allows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.nuisances.opinion_shift import BLOCK, opinion_given, opinion_shift

ROWS = 20_000
ONE = torch.zeros(ROWS, dtype=torch.long)  # a stratum of all rows


def draws(rows: int, width: int, seed: int) -> Tensor:
    """Standard normal states [rows, width]."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


def world(c: float, base: Tensor, opinion: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """o, P(o = 1 | x) and P(r* = 1 | x, o = 1) of logit P(o = 1 | x, r*) = base + c r*."""
    pleased = torch.sigmoid(base + c)
    feedback = opinion * pleased + (1 - opinion) * torch.sigmoid(base)
    uniform = torch.rand(len(base), generator=torch.Generator().manual_seed(seed)).double()
    return (uniform < feedback).double(), feedback, opinion * pleased / feedback


@pytest.mark.parametrize("c", [-2.0, 0.0, 0.3, 3.0])
def test_the_opinion_is_that_of_bayes_rule(c: float) -> None:
    base, opinion = 3 * draws(500, 1, 0)[:, 0], torch.sigmoid(2 * draws(500, 1, 1)[:, 0])
    _, feedback, seen = world(c, base, opinion)
    torch.testing.assert_close(opinion_given(feedback, seen, c), opinion)
    rare, certain = torch.full((500,), 1e-9).double(), torch.full((500,), 1 - 1e-12).double()
    torch.testing.assert_close(torch.logit(opinion_given(rare, seen, c)), torch.logit(seen) - c, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(opinion_given(certain, seen, c), seen, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("c", [-1.5, 0.0, 1.1])
def test_no_log_shows_the_shift_without_an_assumption(c: float) -> None:
    """Whatever c made a log, another c with an opinion and a base of its own gives all outcomes the same probabilities."""
    base, opinion = draws(500, 1, 0)[:, 0] - 2, torch.sigmoid(2 * draws(500, 1, 1)[:, 0])
    _, feedback, seen = world(0.7, base, opinion)
    other = opinion_given(feedback, seen, c)
    p0 = feedback * (1 - seen) / (1 - other)  # P(o = 1 | x, r* = 0)
    _, again, said = world(c, torch.logit(p0), other)
    torch.testing.assert_close(again, feedback)
    torch.testing.assert_close(said, seen)
    assert float((other - opinion).abs().max()) > 0.04


@pytest.mark.parametrize("c", [-1.0, 0.0, 1.1])
def test_the_shift_is_found_where_the_rest_has_nothing_to_do_with_opinions(c: float) -> None:
    """Within three standard errors in each of ten logs, which are as wide as what is found varies."""
    found = []
    for seed in range(10):
        states = draws(ROWS, 50, seed)
        opinion, base = torch.sigmoid(1.5 * states[:, 0]), 0.5 * states[:, 1] - 4
        log = world(c, base, opinion, seed)
        one = opinion_shift(*log, states, torch.arange(ROWS), ONE)
        assert opinion_shift(*log, states, torch.arange(ROWS)) == replace(one, used=0.0, used_stderr=0.0)
        assert one.used == pytest.approx(one.found / (1 + one.stderr**2))
        assert one.used_stderr == pytest.approx(one.stderr / (1 + one.stderr**2) ** 0.5)
        assert one.found == pytest.approx(c, abs=3 * one.stderr)
        found.append(one)
    spread = torch.tensor([one.found for one in found]).std()  # of ten draws, known to 24 %: three times that either way
    error = sum(one.stderr for one in found) / len(found)
    # Here the base goes by a direction that opinions do not take; `stderr` also allows for one at random, so it may be larger.
    assert 0.3 * error < float(spread) < 1.72 * error


def test_a_base_along_a_random_direction_is_as_far_off_as_the_error_says() -> None:
    """One direction of 20 has a fifth of its variance in common with opinions by chance: the error is mostly that."""
    z = []
    for seed in range(40):
        states, generator = draws(ROWS, 20, seed), torch.Generator().manual_seed(seed)
        w = torch.randn(20, generator=generator).double()
        opinion, base = torch.sigmoid(1.5 * states[:, 0]), 0.3 * (states @ w) / 20**0.5 - 4
        found = opinion_shift(*world(0.5, base, opinion, seed), states, torch.arange(ROWS), ONE)
        z.append((found.found - 0.5) / found.stderr)
    assert 0.66 < float(torch.tensor(z).square().mean().sqrt()) < 1.34  # three standard errors of a root of 40 squares


def test_what_no_shift_explains_leaves_it_as_open_as_before() -> None:
    x, noise = draws(ROWS, 2, 6).T
    seen, states = torch.sigmoid(0.3 * x), torch.stack([x, noise], 1)  # rates vary more with x than opinions, whatever c is
    rate = (0.1 * torch.exp(0.8 * x + 0.3 * noise)).clamp(max=0.99)
    o = (torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) < rate).double()
    found = opinion_shift(o, rate, seen, states, torch.arange(ROWS), ONE)
    assert (found.found, found.used) == (0.0, 0.0)
    assert found.used_stderr > 0.95
    assert opinion_shift(o, rate, seen, states, torch.arange(ROWS)).used_stderr == 0  # none is assumed


def test_levels_of_strata_say_nothing_of_opinions() -> None:
    states = draws(ROWS, 30, 2)
    opinion = torch.sigmoid(2 * states[:, 0])
    strata = (states[:, 0] > 0).long()  # the better half of the answers is shown on a page that asks for feedback
    log, everyone = world(0.0, 1.5 * strata.double() - 4, opinion), torch.arange(ROWS)
    assert opinion_shift(*log, states, everyone).found > 1
    within = opinion_shift(*log, states, everyone, strata)
    assert abs(within.found) < 3 * within.stderr < 1


def test_a_log_whose_rows_are_alike_shows_nothing_and_few_units_show_little() -> None:
    states, everyone = draws(500, 4, 3), torch.arange(500)
    o = (everyone % 5 == 0).double()
    assert opinion_shift(o, torch.full((500,), 0.2), torch.full((500,), 0.6), states, everyone, ONE[:500]).used == 0
    states, everyone = draws(ROWS, 4, 3), torch.arange(ROWS)
    log = world(1.0, torch.full((ROWS,), -2.0).double(), torch.sigmoid(2 * states[:, 0]))
    many, few = (opinion_shift(*log, states, everyone, ONE, units) for units in (ROWS, 200))
    assert few.stderr > 5 * many.stderr
    assert 0 < few.used < many.used
    assert few.found == many.found


def test_rows_and_blocks_are_those_asked_for() -> None:
    states = draws(BLOCK + 1000, 3, 4)
    rows = torch.arange(500, BLOCK + 700)
    log = world(1.0, torch.full((len(rows),), -2.0).double(), torch.sigmoid(states[rows, 0]))
    picked = opinion_shift(*log, states, rows)
    alone = opinion_shift(*log, states[rows], torch.arange(len(rows)))
    assert (picked.found, picked.stderr) == (pytest.approx(alone.found), pytest.approx(alone.stderr))
    assert 0 < picked.stderr < math.inf
