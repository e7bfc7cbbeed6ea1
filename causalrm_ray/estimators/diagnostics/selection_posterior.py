"""Noise rates, E[r*] and who gives feedback, as far as a log determines them once a fit has ranked its rows.

    a fit's opinions, P(o = 1 | x, r*), rates --explained--> Explained --MECHANISMS--> Quantities with covariances

The ranking is taken as the fit's; its level and scale are not: logits f become m + b + e^s (f - m), m their mean.
What else is uncertain is up to the mechanism (methods.selection), which is assumed to be right:

    label      outcomes of all rows by losses.selection.graded_outcomes, with (a, c, d) of each group
    features   labels of the rows with feedback, f = logit P(r* = 1 | x, o = 1), with an error of f in the direction of
               P(o = 1 | x); what opinions do besides, by its own error

Priors of rates and d are those of the fits, those of b, s, a and c ours. Ours; Gaussian approximations about the mode (Laplace).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from causalrm_ray.estimators.core.clusters import summed
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.diagnostics.laplace import Gaussian, laplace
from causalrm_ray.estimators.methods.outcome_models import CENTRE, STRENGTH, logit
from causalrm_ray.estimators.nuisances.level import SLOPE_PRIOR
from causalrm_ray.estimators.nuisances.opinion_shift import opinion_given
from causalrm_ray.estimators.pipeline import RewardFits
from causalrm_ray.losses.selection import DISLIKED, LIKED, graded_outcomes, outcomes
from causalrm_ray.types import NoiseRates

BINS, ALONG = 50, 10  # of f, within a group, and of logit P(o = 1 | x)
SURE = 1e-6  # probabilities lie within SURE..1 - SURE
POSSIBLE = 0.1  # weight from which a mechanism counts
LEVEL, BASE, ODDS, GRADE = 1.0, 2.0, 1.0, 0.5**0.5  # standard deviations of the priors of b, a, c, d
RATE = (2 * STRENGTH) ** -0.5  # that of logit(2 rho)
ALONE = {"latent": "label", "two_stage": "features"}  # methods of one mechanism


@dataclass(frozen=True, eq=False)
class Explained:
    """A log as a fit explains it.

    `opinion` [N], P(r* = 1 | x), out of fold; `seen` [N], P(r* = 1 | x, o = 1), and `feedback` [N], P(o = 1 | x), by its
    selection model; `rates` of the noise, `known` or found; `weights` of the mechanisms; the log-odds `shift` that opinions do
    besides features, and its standard error; that of the opinions' level, where judged rows set it (else None).
    """

    opinion: Tensor
    seen: Tensor
    feedback: Tensor
    rates: NoiseRates
    known: bool
    weights: Mapping[str, float]
    shift: float = 0.0
    shift_stderr: float = 0.0
    level_stderr: float | None = None

    @property
    def says_liked(self) -> Tensor:
        """P(r = 1 | x, o = 1) [N]."""
        return self.rates.rho_10 + (1 - self.rates.rho_01 - self.rates.rho_10) * self.seen


@dataclass(frozen=True, eq=False)
class Quantities:
    """Logits of 2 rho_01, 2 rho_10 and E[r*], `whole` [3], with standard errors `errors` [3]; log P(o = 1 | r* = k), k = 1, 0, of
    each group, `on` [S, 2], with covariances `spread` [S, 2, 2]."""

    whole: Tensor
    errors: Tensor
    on: Tensor
    spread: Tensor


def explained(fits: RewardFits, method: str) -> Explained | None:
    """The log as `method` explains it; None for one that does not model who gives feedback."""
    fitted = fits.fits[method]
    figures, level = fitted.figures, fits.level.get(method)
    weights = {name: figures[f"weight_{name}"] for name in MECHANISMS if f"weight_{name}" in figures}
    if not weights and method in ALONE:
        weights = {ALONE[method]: 1.0}
    if not weights or fitted.opinion is None or fitted.joint is None:
        return None
    opinion = torch.sigmoid(fitted.opinion.double()).clamp(SURE, 1 - SURE)
    joint = fitted.joint.double()
    feedback = joint.sum(1).clamp(SURE, 1 - SURE)
    seen = (joint[:, 0] / feedback).clamp(SURE, 1 - SURE)
    shift, error = figures.get("shift_used", 0.0), figures.get("shift_used_stderr", 0.0)
    rates, level_error = fitted.rates or fits.rates, None if level is None else level.shift_stderr
    return Explained(opinion, seen, feedback, rates, fits.known, weights, shift, error, level_error)


def by_opinion(log: Explained, observations: Observations, groups: Tensor, number: int) -> Quantities:
    """Where opinions decide: b, s, the rates, and (a, c, d) of each of `number` groups, `groups` [N]."""
    f, outcome = torch.logit(log.opinion), outcomes(observations.o, observations.r).long()
    cell, at, _ = _cells(f, groups, number)
    counts = torch.bincount(cell * 3 + outcome, minlength=number * BINS * 3).reshape(number, BINS, 3).double()
    rows = counts.sum(-1)
    weights = torch.where(rows.sum(1, keepdim=True) > 0, rows, 1.0)
    centre = (at * rows).sum() / rows.sum()
    at = torch.where(rows.sum(1, keepdim=True) > 0, at, centre)  # an empty group is like any other, for all that is known

    def parts(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, c, d = theta[4:].reshape(number, 3).T[..., None]
        moved = _moved(at, centre, theta)
        return moved, *graded_outcomes(moved, a, c, d, *_rates(log, theta))

    def quantities(theta: Tensor) -> Tensor:
        moved, _, on1, on0 = parts(theta)
        e = torch.sigmoid(moved)
        on = [(on * weights).sum(1) / (share * weights).sum(1) for on, share in ((on1, e), (on0, 1 - e))]
        return torch.cat([theta[2:4], torch.logit((e * rows).sum() / rows.sum())[None], torch.stack(on, 1).log().flatten()])

    share = (counts[..., [DISLIKED, LIKED]].sum((-1, -2)) / rows.sum(1).clamp_min(1)).clamp(0.001, 0.999)
    prior, start = _scalars(log, LEVEL if log.level_stderr is None else log.level_stderr)
    selection = torch.stack([torch.logit(share), torch.zeros(number), torch.zeros(number)], 1).double().flatten()
    prior = _beside(prior, Gaussian(selection, torch.diag(torch.tensor([BASE, ODDS, GRADE] * number).double().square())))
    given = log.feedback[:, None] * torch.stack([1 - log.says_liked, log.says_liked], 1)
    dispersion = _dispersion(one_hot(outcome, 3)[:, [DISLIKED, LIKED]] - given, observations.cluster)
    posterior = laplace(lambda theta: parts(theta)[1].exp(), counts, prior, torch.cat([start, selection]), dispersion)
    return _split(*posterior.of(quantities), number)


def by_features(log: Explained, observations: Observations, groups: Tensor, number: int) -> Quantities:
    """Where features decide: b, s, t and the rates, by the labels; P(o = 1 | r* = k) of each group by its rows with feedback.

    Opinions learned where there is feedback stand for those of all rows. What matters most is an error of theirs in the direction
    of P(o = 1 | x): t times its standardised logit.
    """
    f, o = torch.logit(log.seen), observations.o.double()
    along = torch.logit(log.feedback)
    along = (along - along.mean()) / along.std().clamp_min(SURE)
    seen = observations.o == 1
    r, clusters = observations.r[seen].double(), observations.clusters(seen)
    _, _, tenth = _cells(along[seen], torch.zeros_like(groups[seen]), 1, ALONG)
    cell, at, _ = _cells(f[seen], tenth, ALONG)
    rows, liked = (torch.bincount(cell, weight, ALONG * BINS) for weight in (torch.ones_like(r), r))
    beside = torch.bincount(cell, along[seen], ALONG * BINS) / rows.clamp_min(1)
    centre = f[seen].mean()

    def probabilities(theta: Tensor) -> Tensor:
        rho_01, rho_10 = _rates(log, theta)
        says = rho_10 + (1 - rho_01 - rho_10) * torch.sigmoid(_moved(at.flatten(), centre, theta) + theta[4] * beside)
        return torch.stack([1 - says, says], -1)

    prior, start = _scalars(log, LEVEL)
    prior, start = _beside(prior, _one(0.0, SLOPE_PRIOR)), torch.cat([start, torch.zeros(1, dtype=torch.float64)])
    dispersion = _dispersion((r - log.says_liked[seen])[:, None], clusters)
    posterior = laplace(probabilities, torch.stack([rows - liked, liked], -1), prior, start, dispersion)
    # The last parameter is what opinions do besides features, or, where judged rows set it, the level of all opinions.
    posterior = _beside(posterior, _one(log.shift, log.shift_stderr) if log.level_stderr is None else _one(0.0, log.level_stderr))
    size = torch.bincount(groups, minlength=number).clamp_min(1)

    def opinions(theta: Tensor) -> tuple[Tensor, Tensor]:  # P(r* = 1 | x, o = 1), P(r* = 1 | x)
        given = torch.sigmoid(_moved(f, centre, theta) + theta[4] * along)
        if log.level_stderr is None:
            return given, opinion_given(log.feedback, given, theta[5])
        return given, torch.sigmoid(torch.logit(log.opinion) + theta[5])

    def quantities(theta: Tensor) -> Tensor:
        given, opinion = opinions(theta)
        parts = torch.stack([o * given, o * (1 - given), opinion, 1 - opinion], 1)
        mean = torch.zeros(number, 4, dtype=f.dtype).index_add(0, groups, parts) / size[:, None]
        on = mean[:, :2].clamp_min(SURE).log() - mean[:, 2:].clamp_min(SURE).log()
        return torch.cat([theta[2:4], torch.logit(opinion.mean())[None], on.flatten()])

    found = _split(*posterior.of(quantities), number)
    given, opinion = opinions(posterior.mean)
    with_feedback = torch.stack([o * given, o * (1 - given)], 1)
    all_rows = torch.stack([opinion, 1 - opinion], 1)
    for s in range(number):
        among = groups == s
        if not bool(seen[among].any()):  # as unknown as before: the share of all, with the spread of a base
            found.on[s], found.spread[s] = torch.log(o.mean()), torch.eye(2) * BASE**2
            continue
        parts, whole = with_feedback[among], all_rows[among]
        influence = parts / parts.mean(0).clamp_min(SURE) - whole / whole.mean(0).clamp_min(SURE)
        total = summed(influence, observations.clusters(among)) / len(parts)
        found.spread[s] += total.T @ total
    return found


MECHANISMS: Mapping[str, Callable[[Explained, Observations, Tensor, int], Quantities]] = {
    "label": by_opinion,
    "features": by_features,
}


def _scalars(log: Explained, level: float) -> tuple[Gaussian, Tensor]:
    """The prior of (b, s, logit 2 rho_01, logit 2 rho_10), with the standard deviation `level` of b, and where they start."""
    rates = torch.logit((2 * torch.tensor(astuple(log.rates), dtype=torch.float64)).clamp(SURE, 1 - SURE))
    mean, start = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    mean[2:], start[2:] = logit(2 * CENTRE), rates
    error = torch.tensor([level, SLOPE_PRIOR, RATE, RATE], dtype=torch.float64)
    return Gaussian(mean, torch.diag(error.square())), start


def _rates(log: Explained, theta: Tensor) -> Tensor:
    """rho_01 and rho_10 [2]: those of theta = (b, s, logit 2 rho_01, logit 2 rho_10, ...), unless they are known."""
    return torch.tensor(astuple(log.rates), dtype=theta.dtype) if log.known else torch.sigmoid(theta[2:4]) / 2


def _moved(f: Tensor, centre: Tensor, theta: Tensor) -> Tensor:
    """m + b + e^s (f - m) for theta = (b, s, ...)."""
    return centre + theta[0] + theta[1].exp() * (f - centre)


def _beside(one: Gaussian, other: Gaussian) -> Gaussian:
    """Two independent sets of parameters as one."""
    return Gaussian(torch.cat([one.mean, other.mean]), torch.block_diag(one.covariance, other.covariance))


def _cells(f: Tensor, groups: Tensor, number: int, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """The cell [N] of each row, `bins` of equally many rows of each group in the order of `f` [N]; means of f in them [S, B]; the
    bin [N] of each row within its group."""
    order = torch.argsort(f)
    order = order[torch.argsort(groups[order], stable=True)]
    sizes = torch.bincount(groups, minlength=number)
    within = torch.empty_like(groups)
    within[order] = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[groups[order]]
    place = within * bins // sizes[groups]
    cell = groups * bins + place
    rows = torch.bincount(cell, minlength=number * bins).clamp_min(1)
    return cell, (torch.bincount(cell, f, number * bins) / rows).reshape(number, bins), place


def _one(mean: float, error: float) -> Gaussian:
    """A single parameter."""
    return Gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([[error**2]], dtype=torch.float64))


def _dispersion(residual: Tensor, cluster: Tensor | None) -> float:
    """How much more sums of `residual` [M, K] vary than if rows of one `cluster` [M] were independent, at least 1."""
    alone, together = (summed(residual.double(), by).square().sum(0) for by in (None, cluster))
    return max(1.0, float((together / alone.clamp_min(SURE)).max()))


def _split(value: Tensor, covariance: Tensor, number: int) -> Quantities:
    pairs = covariance[3:, 3:].reshape(number, 2, number, 2)
    spread = torch.stack([pairs[s, :, s] for s in range(number)])
    return Quantities(value[:3], covariance.diagonal()[:3].clamp_min(0).sqrt(), value[3:].reshape(number, 2), spread)
