"""Opinions may drive feedback besides features: what a log says of that, and P(r* = 1 | x) corrected by it.

    logit P(o = 1 | x, r*) = g(x) + c r*

with e = P(r* = 1 | x) unknown, P(o = 1 | x) and e_1 = P(r* = 1 | x, o = 1) shown by feedback. Any c fits any log with a g of
its own (`opinion_given`), so none is identified: two logs of the same outcomes may differ in c. It is found under one assumption,
that what else drives feedback has nothing to do with opinions within strata, and where feedback is rare, so that P(o = 1 | x, r*)
is G(x) e^(c r*):

    E[o / (1 + (e^c - 1) e) | e, stratum] is the same for all e

A few hundred impressions drawn at random and judged show the level without the assumption. Ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import root_scalar
from torch import Tensor

from causalrm_ray.checks import check_same_length
from causalrm_ray.models.scorers.heads import BLOCK, to_logit

WIDEST_SHIFT = 4.0  # of c either way
PRIOR = 1.0  # standard deviation of c before a log is seen, as that of all odds between opinions (mechanisms.likely_odds)
STEP = 1e-3  # of c, for a derivative
SURE = 1e-4  # probabilities of the models no nearer to 0 and 1 than this


@dataclass(frozen=True)
class OpinionShift:
    """The log-odds `found` by which the pleased give feedback more readily than others at the same x, its `stderr` if the
    assumption holds, and `used`, what is expected of it then: 0 without strata, where the assumption is not made."""

    found: float
    used: float
    stderr: float


def opinion_given(feedback: Tensor, seen: Tensor, c: float | Tensor) -> Tensor:
    """e = P(r* = 1 | x) [M] of `feedback` [M], P(o = 1 | x), and `seen` [M], P(r* = 1 | x, o = 1), if opinions do c besides:

        e^-g = (1 / P(o = 1 | x) - 1) / (e_1 e^-c + 1 - e_1)        e = P(o = 1 | x) e_1 (1 + e^(-g - c))

    by Bayes' rule. Where feedback is rare it is logit e = logit e_1 - c; where all rows have feedback, e = e_1. `feedback` and
    `seen` lie in (0, 1).
    """
    less = torch.as_tensor(-c, dtype=seen.dtype).exp()
    odds = (1 / feedback - 1) / (seen * less + 1 - seen)  # e^-g
    return feedback * seen * (1 + odds * less)


def opinion_shift(
    o: Tensor,
    feedback: Tensor,
    seen: Tensor,
    states: Tensor,
    rows: Tensor,
    strata: Tensor | None = None,
    units: int | None = None,
) -> OpinionShift:
    """c of the module's docstring: the root of the pseudo-Poisson score

        T(c) = mean of (e - mean of e in the stratum) o / (1 + (e^c - 1) e),    logit e = logit e_1 - c

    Where people choose what they see, as in shops, they choose what they expect to like, and the assumption fails: on Coat's
    ratings c is 0.17 by a random sample, and about 1.7 is found. Strata that carry what else drives feedback make it plausible.

    `o` [M] is whether feedback was given, `feedback` [M] P(o = 1 | x), `seen` [M] e_1, both out of fold, of the `rows` [M] of
    `states` [N, D]; `strata` [M] number from 0. The standard error is that of T over its slope. T varies as a sum over `units`
    (rows, where none are given), and as what a G(x) = P(o = 1 | x) / (1 + (e^c - 1) e) that goes by any direction of the states
    would have to do with opinions by chance:

        Var T = Var e (Var o / units + Var G E Cov[X w, e]^2 / (E Var[X w] Var e)),    w ~ N(0, 1),  variances within strata

    Of c ~ N(0, PRIOR^2) and an estimate of this error, c PRIOR^2 / (PRIOR^2 + stderr^2) is expected, and used. Where no c
    explains the score, none is found.
    """
    check_same_length(o=o, feedback=feedback, opinion=seen, rows=rows)
    assumed = strata is not None
    strata = torch.zeros(len(o), dtype=torch.long) if strata is None else strata
    o, feedback, logit = o.double(), feedback.double(), to_logit(seen.double().clamp(SURE, 1 - SURE))

    def total(c: float) -> float:  # T(c)
        e = torch.sigmoid(logit - c)
        return float((_within(e, strata) * o / (1 + math.expm1(c) * e)).mean())

    if not total(-WIDEST_SHIFT) > 0 > total(WIDEST_SHIFT):  # rates vary with opinions otherwise than any c makes them
        return OpinionShift(0.0, 0.0, 0.0)
    c = root_scalar(total, bracket=(-WIDEST_SHIFT, WIDEST_SHIFT)).root
    slope = (total(c + STEP) - total(c - STEP)) / (2 * STEP)
    e = torch.sigmoid(logit - c)
    base, rate = (_within(share / (1 + math.expm1(c) * e), strata) for share in (o, feedback))
    e = _within(e, strata)
    spread = float(e.square().mean())
    if spread < 1e-9 or abs(slope) < 1e-9:  # all rows alike: nothing is shown
        return OpinionShift(0.0, 0.0, 0.0)
    chance = _by_chance(states, rows, e / spread**0.5, strata)
    variance = spread * (float(base.square().mean()) / (units or len(e)) + float(rate.square().mean()) * chance)
    stderr = math.sqrt(variance) / abs(slope)
    return OpinionShift(c, c * PRIOR**2 / (PRIOR**2 + stderr**2) if assumed else 0.0, stderr)


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
