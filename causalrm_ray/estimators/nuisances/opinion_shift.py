"""Opinions may drive feedback besides features: what a log says of that, and P(r* = 1 | x) corrected by it.

    P(o = 1 | x, r*) = G(x) e^(c r*)      =>      P(o = 1 | x) = G(x) [1 + (e^c - 1) e(x)],   logit e(x) = logit e_1(x) - c

with e = P(r* = 1 | x) and e_1 = P(r* = 1 | x, o = 1), which feedback shows. Any c fits any log with a G of its own; none is
identified. It is found under one assumption, that what else drives feedback, log G, has nothing to do with the opinion:

    Cov[log G(x), e(x)] = 0

and is trusted as far as a G that has nothing to do with it would not do the same by chance. A few hundred impressions drawn at
random and judged show the level without the assumption. Ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import root_scalar
from torch import Tensor

from causalrm_ray.checks import check_same_length

WIDEST_SHIFT = 4.0  # of c either way
CHANCE = 2.0  # up to so many times what chance gives, a correlation shows nothing
POSSIBLE = 0.99  # share of the rows whose P(o = 1 | x, r*) must stay below 1
BLOCK = 8_192  # rows of states at a time


@dataclass(frozen=True)
class OpinionShift:
    """The log-odds `found` by which the pleased give feedback more readily than others at the same x; `used`, the part that is
    trusted; `strength`, how many times the correlation of log P(o | x) and opinion exceeds what chance gives."""

    found: float
    used: float
    strength: float


def opinion_shift(
    feedback: Tensor,
    opinion: Tensor,
    states: Tensor,
    rows: Tensor,
    strata: Tensor | None = None,
    units: int | None = None,
) -> OpinionShift:
    """c of the module's docstring, and the part of it to be used: none without strata.

    Where people choose what they see, as in shops, they choose what they expect to like, and the assumption fails: on Coat's
    ratings c is 0.17 by a random sample, and 1.3 to 2.2 is found. Strata that carry what else drives feedback make it plausible.

    `feedback` [M] is P(o = 1 | x), `opinion` [M] e_1, both out of fold and in (0, 1), of the `rows` [M] of `states` [N, D].
    Covariances are taken within `strata` [M]: how their levels go with opinions says nothing. What is trusted is the part
    1 - (CHANCE / strength)^2, at least 0. Chance is a G that goes by any direction of the states, or is drawn for each of `units`
    (rows, where none are given):

        E Cov[X w, e]^2 / (E Var[X w] Var e) + 1 / units,    w ~ N(0, 1)

    No more of c is used than leaves P(o = 1 | x, r*) a probability. Where no c explains the covariance, none is found.
    """
    check_same_length(feedback=feedback, opinion=opinion, rows=rows)
    assumed = strata is not None
    strata = torch.zeros(len(opinion), dtype=torch.long) if strata is None else strata
    log_rate, logit = feedback.double().clamp_min(1e-6).log(), torch.logit(opinion.double().clamp(1e-6, 1 - 1e-6))

    def unexplained(c: float) -> float:  # Cov[log G, e], falling in c
        e = torch.sigmoid(logit - c)
        return float((_within(log_rate - torch.log1p(math.expm1(c) * e), strata) * e).mean())

    if not unexplained(-WIDEST_SHIFT) > 0 > unexplained(WIDEST_SHIFT):  # rates vary with opinions otherwise than any c makes them
        return OpinionShift(0.0, 0.0, 0.0)
    found = root_scalar(unexplained, bracket=(-WIDEST_SHIFT, WIDEST_SHIFT)).root
    e, rate = _within(torch.sigmoid(logit - found), strata), _within(log_rate, strata)
    scale = (e.square().mean() * rate.square().mean()).sqrt()
    if float(scale) < 1e-9:  # all rows alike: nothing is shown
        return OpinionShift(0.0, 0.0, 0.0)
    chance = _by_chance(states, rows, e / e.square().mean().sqrt(), strata) + 1 / (units or len(e))
    strength = abs(float((rate * e).mean() / scale)) / math.sqrt(chance)
    trusted = max(0.0, 1 - (CHANCE / strength) ** 2) if assumed and strength > 0 else 0.0
    return OpinionShift(found, _possible(found * trusted, feedback.double(), logit), strength)


def _possible(c: float, feedback: Tensor, logit: Tensor) -> float:
    """`c`, or as much of it as leaves P(o = 1 | x, r* = 1 or 0) = P(o = 1 | x) e_1 / e or (1 - e_1) / (1 - e) a probability."""
    sign = 1.0 if c >= 0 else -1.0  # for c < 0 the displeased are the ones who give feedback more readily
    most = sign * logit - torch.logit(feedback * torch.sigmoid(sign * logit))  # of |c| in each row
    few = int((1 - POSSIBLE) * len(most))
    return sign * min(abs(c), max(float(most.kthvalue(few + 1).values), 0.0))


def _within(value: Tensor, strata: Tensor) -> Tensor:
    """`value` [M] less its mean in each of `strata` [M]."""
    count = torch.bincount(strata).clamp_min(1)
    return value - (torch.zeros(len(count), dtype=value.dtype).index_add_(0, strata, value) / count)[strata]


def _by_chance(states: Tensor, rows: Tensor, e: Tensor, strata: Tensor) -> float:
    """Expected squared correlation of X w, w ~ N(0, 1), with `e` [M], of mean 0 within each stratum and variance 1."""
    count = torch.bincount(strata).clamp_min(1).double()
    total = torch.zeros(len(count), states.shape[1], dtype=torch.float64)
    covariance, squares = torch.zeros(states.shape[1], dtype=torch.float64), 0.0
    for part in torch.arange(len(rows)).split(BLOCK):
        x = states[rows[part]].double()
        total.index_add_(0, strata[part], x)
        covariance += x.T @ e[part]  # as e has no mean in a stratum, the states' means do not matter
        squares += float(torch.linalg.vector_norm(x)) ** 2
    within = squares - float((total.square() / count[:, None]).sum())
    return float((covariance / len(rows)).square().sum()) / max(within / len(rows), 1e-12)
