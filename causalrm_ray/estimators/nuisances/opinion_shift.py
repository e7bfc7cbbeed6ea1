"""Opinions may drive feedback besides features: what a log says of that, and P(r* = 1 | x) corrected by it.

    logit P(o = 1 | x, r*) = g(x) + c r*

with e = P(r* = 1 | x) unknown, P(o = 1 | x) and e_1 = P(r* = 1 | x, o = 1) shown by feedback. Any c fits any log with a g of
its own (`opinion_given`), so none is identified: two logs of the same outcomes may differ in c. It is found under one assumption,
that what else drives feedback, by P(o = 1 | x, r* = 0), has nothing to do with opinions within strata.

A few hundred impressions drawn at random and judged show the level without the assumption. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import root_scalar
from torch import Tensor

from causalrm_ray.checks import check_same_length
from causalrm_ray.models.scorers.heads import BLOCK

WIDEST_SHIFT = 4.0  # of c either way
PRIOR = 1.0  # standard deviation of c before a log is seen, as that of all odds between opinions (mechanisms.likely_odds)
STEP = 1e-3  # of c, for a derivative
SURE = 1e-4  # probabilities of the models no nearer to 0 and 1 than this


@dataclass(frozen=True)
class OpinionShift:
    """The log-odds `found` by which the pleased give feedback more readily than others at the same x, its `stderr` if the
    assumption holds, and `used`, what is expected of it then, with its error `used_stderr`: both 0 without strata, where the
    assumption is not made."""

    found: float
    used: float
    stderr: float
    used_stderr: float


def opinion_given(feedback: Tensor, seen: Tensor, c: float | Tensor) -> Tensor:
    """e = P(r* = 1 | x) [M] of `feedback` [M], P(o = 1 | x), and `seen` [M], P(r* = 1 | x, o = 1), if opinions do c besides:

        e^-g = (1 / P(o = 1 | x) - 1) / (e_1 e^-c + 1 - e_1)        e = P(o = 1 | x) e_1 (1 + e^(-g - c))

    by Bayes' rule. Where feedback is rare it is logit e = logit e_1 - c; where all rows have feedback, e = e_1. `feedback` and
    `seen` lie in (0, 1).
    """
    less = torch.as_tensor(-c, dtype=seen.dtype).exp()
    return feedback * seen * (1 + _odds(feedback, seen, less) * less)


def _odds(feedback: Tensor, seen: Tensor, less: Tensor) -> Tensor:
    """e^-g [M] of `opinion_given`, where `less` is e^-c."""
    return (1 / feedback - 1) / (seen * less + 1 - seen)


def opinion_shift(
    o: Tensor,
    feedback: Tensor,
    seen: Tensor,
    states: Tensor,
    rows: Tensor,
    strata: Tensor | None = None,
    units: int | None = None,
) -> OpinionShift:
    """c of the module's docstring, from the roots of the strata's scores, with inverse variances for weights:

        T(c) = mean of (e - mean of e) o p_0 / P(o = 1 | x),      e, p_0 = P(o = 1 | x, r* = 0) by c

    o p_0 / P(o = 1 | x) is p_0 on average, and that has nothing to do with e, by assumption, if c is right. A stratum where
    nearly all rows get feedback shows little of c, and its larger p_0 would outweigh what the others show. A root's standard
    error is that of T over its slope. T varies as a sum over `units` (rows, where none are given), and as what a p_0 that goes by
    any direction of the states would have to do with opinions by chance, in all strata alike:

        Var T = Var e (Var o p_0 / P(o = 1 | x) / units + Var p_0 E Cov[X w, e]^2 / (E Var[X w] Var e)),    w ~ N(0, 1)

    Where people choose what they see, as in shops, they choose what they expect to like, and the assumption fails: on Coat's
    ratings c is 0.17 by a random sample, and about 1.7 is found. Strata that carry what else drives feedback make it plausible.

    `o` [M] is whether feedback was given, `feedback` [M] P(o = 1 | x), `seen` [M] e_1, both out of fold, of the `rows` [M] of
    `states` [N, D]; `strata` [M] number from 0. Of c ~ N(0, PRIOR^2) and an estimate of this error, c PRIOR^2 / (PRIOR^2 +
    stderr^2) is expected, and used. Strata where no c explains the score, or all rows are alike, show nothing.
    """
    check_same_length(o=o, feedback=feedback, opinion=seen, rows=rows)
    assumed = strata is not None
    strata = torch.zeros(len(o), dtype=torch.long) if strata is None else strata
    o, feedback, seen = o.double(), feedback.double().clamp(SURE, 1 - SURE), seen.double().clamp(SURE, 1 - SURE)
    shown = []  # root, and its variances by sampling and by chance
    for number in strata.unique().tolist():
        among = strata == number
        share = float(among.sum()) * (units or len(o)) / len(o)
        shown.append(_root(o[among], feedback[among], seen[among], states, rows[among], share))
    found = [one for one in shown if one is not None]
    if not found:
        return _expected(0.0, WIDEST_SHIFT, assumed)
    c, sampling, chance = torch.tensor(found, dtype=torch.float64).T
    weight = 1 / (sampling + chance)
    weight = weight / weight.sum()
    variance = (weight.square() @ sampling) + (weight @ chance.sqrt()).square()
    return _expected(float(weight @ c), min(float(variance.sqrt()), WIDEST_SHIFT), assumed)


def _expected(found: float, stderr: float, assumed: bool) -> OpinionShift:
    """What was found, and what is expected of c ~ N(0, PRIOR^2) by it, if the assumption is made."""
    own = PRIOR**2 / (PRIOR**2 + stderr**2) if assumed else 0.0
    return OpinionShift(found, own * found, stderr, own**0.5 * stderr)


def _root(
    o: Tensor, feedback: Tensor, seen: Tensor, states: Tensor, rows: Tensor, units: float
) -> tuple[float, float, float] | None:
    """The root of one stratum's T, and its variances by sampling and by chance; None where it shows nothing."""

    def parts(c: float) -> tuple[Tensor, Tensor]:  # e and p_0, [M] each
        less = torch.as_tensor(-c, dtype=seen.dtype).exp()
        return opinion_given(feedback, seen, c), 1 / (1 + _odds(feedback, seen, less))

    def total(c: float) -> float:  # T(c)
        e, unpleased = parts(c)
        return float(((e - e.mean()) * o * unpleased / feedback).mean())

    if not total(-WIDEST_SHIFT) > 0 > total(WIDEST_SHIFT):  # rates vary with opinions otherwise than any c makes them
        return None
    c = root_scalar(total, bracket=(-WIDEST_SHIFT, WIDEST_SHIFT)).root
    slope = (total(c + STEP) - total(c - STEP)) / (2 * STEP)
    e, unpleased = parts(c)
    e = e - e.mean()
    spread = float(e.square().mean())
    if spread < 1e-9 or abs(slope) < 1e-9:  # all rows alike
        return None
    sampling = float((o * unpleased / feedback).var(correction=0)) / units
    chance = float(unpleased.var(correction=0)) * _by_chance(states, rows, e / spread**0.5)
    return c, spread * sampling / slope**2, spread * chance / slope**2


def _by_chance(states: Tensor, rows: Tensor, e: Tensor) -> float:
    """Expected squared correlation of X w, w ~ N(0, 1), with `e` [M], of mean 0 and variance 1."""
    total, covariance = torch.zeros(2, states.shape[1], dtype=torch.float64)
    squares = 0.0
    for part in torch.arange(len(rows)).split(BLOCK):
        x = states[rows[part]].double()
        total += x.sum(0)
        covariance += x.T @ e[part]  # as e has no mean, the states' means do not matter
        squares += float(torch.linalg.vector_norm(x)) ** 2
    within = squares / len(rows) - float((total / len(rows)).square().sum())
    return float((covariance / len(rows)).square().sum()) / max(within, 1e-12)
