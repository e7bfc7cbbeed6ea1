"""How labels change along a proxy's ranks: flat at both ends, where only the noise varies labels, and rising between.

feedback rows in order of the proxy -> counts per bin -> curve of P(r = 1 | rank, o = 1) -> its two ends are the rates

    P(r = 1 | z) = rho_10 + (1 - rho_01 - rho_10) e(z),     e(z) = P(r* = 1 | z, o = 1) = Phi(+-(b |z - m|)^g)

with z the normal score of the row's rank, and a slope b of its own on either side of m. A Gaussian utility ranked by a proxy with
Gaussian errors has g = 1; larger g has ends that are flatter. The flat ends grow with the data, so that all rows which agree that
they are anchors count, and rows in between are not taken for anchors. Ours; the channel is that of arXiv 2603.18736.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import Observations

BINS = 60
BUNCHES = 2000  # of clusters, at most, in a bootstrap
# Of theta = (logit rho_10, logit rho_01, m, log b left, log b right, log g): a Gaussian prior, worth a row or two for the rates.
CENTRE = torch.tensor([-1.5, -1.5, 0.0, math.log(5.0), math.log(5.0), math.log(1.2)], dtype=torch.float64)
PRECISION = torch.tensor([0.05, 0.05, 0.1, 0.8**-2, 0.8**-2, 0.35**-2], dtype=torch.float64)
LOWEST = torch.tensor([-7.0, -7.0, -2.5, -2.0, -2.0, -2.0], dtype=torch.float64)
HIGHEST = torch.tensor([2.0, 2.0, 2.5, 3.5, 3.5, 3.5], dtype=torch.float64)
RHO_10, RHO_01 = 0, 1  # places in theta
TINY = 1e-9
SLOW, FIXED = 0.62, 1e6  # Phi(0.62 z) is 0.9 at the middle of the outermost twentieth; a precision that lets nothing move


@dataclass(frozen=True, eq=False)
class Ranks:
    """Rows with feedback by rank: `rows` [M] their numbers, `bins` [M] in 0..B-1, `score` [B] the bins' normal scores, rising."""

    rows: Tensor
    bins: Tensor
    score: Tensor

    def counts(self, kind: Tensor, kinds: int) -> Tensor:
        """Rows [B, K] per bin and `kind` [M] in 0..K-1."""
        flat = torch.bincount(self.bins * kinds + kind, minlength=len(self.score) * kinds)
        return flat.reshape(len(self.score), kinds).double()

    def resample(self, kind: Tensor, kinds: int, draws: int, seed: int, cluster: Tensor | None) -> Tensor:
        """Bootstrap [D, B, K] of `counts`; `cluster` [N] of all rows of the log."""
        among = None if cluster is None else cluster[self.rows]
        return resample(self.counts(kind, kinds), draws, seed, self.bins * kinds + kind, among)


def rank_feedback(prob: Tensor, observations: Observations, among: Tensor | None = None) -> Ranks:
    """Bins of equal ranks of the rows with feedback, only those of the mask `among` [N] if given; ties share their mean rank."""
    rows = ((observations.o == 1) if among is None else (observations.o == 1) & among).nonzero()[:, 0]
    _, place, ties = torch.unique(prob[rows], return_inverse=True, return_counts=True)
    quantile = ((ties.cumsum(0).double() - ties / 2) / len(rows))[place]
    _, bins, size = torch.unique((quantile * BINS).long().clamp(max=BINS - 1), return_inverse=True, return_counts=True)
    mean = torch.zeros(len(size), dtype=torch.float64).index_add_(0, bins, quantile) / size
    return Ranks(rows, bins, torch.special.ndtri(mean))


def sureness(theta: Tensor, score: Tensor) -> Tensor:
    """e(z) = P(r* = 1 | z, o = 1) [D, B] of curves `theta` [D, 6] at normal scores [B]."""
    eta, _ = _eta(theta, score)
    return torch.special.ndtr(eta)


def fit_curves(
    score: Tensor,
    counts: Tensor,
    start: Tensor | None = None,
    steps: int = 15,
    centre: Tensor = CENTRE,
    precision: Tensor = PRECISION,
) -> Tensor:
    """Most likely curves [D, 6] under a Gaussian prior of theta, for `counts` [D, B, 2] of labels 0 and 1 per bin.

    Damped Fisher scoring, all D at once: a step that does not help is not taken and the next is shorter. `start` [D, 6] or [6]
    is where it begins; without it (D = 1), twelve starts compete over more steps.
    """
    if start is None:
        many = _starts()
        found = fit_curves(score, counts.expand(len(many), -1, -1), many, 40, centre, precision)
        return found[_cost(found, score, counts, centre, precision).argmin()][None]
    theta = start.expand(len(counts), -1)
    cost, damping = _cost(theta, score, counts, centre, precision), torch.full((len(counts),), 1e-2, dtype=torch.float64)
    total = counts.sum(-1)
    for _ in range(steps):
        prob, slope = _curve(theta, score)
        spread = prob * (1 - prob)
        gradient = (((counts[..., 1] - total * prob) / spread)[..., None] * slope).sum(1) - (theta - centre) * precision
        information = torch.einsum("db,dbi,dbj->dij", total / spread, slope, slope) + torch.diag_embed(precision)
        damped = information + torch.diag_embed(damping[:, None] * torch.diagonal(information, dim1=1, dim2=2))
        moved = torch.clamp(theta + torch.linalg.solve(damped, gradient).clamp(-2, 2), LOWEST, HIGHEST)
        moved_cost = _cost(moved, score, counts, centre, precision)
        better = moved_cost <= cost
        theta, cost = torch.where(better[:, None], moved, theta), torch.where(better, moved_cost, cost)
        damping = torch.where(better, damping * 0.3, damping * 5).clamp(1e-9, 1e6)
    return theta


def evidence_of_flat_ends(point: Tensor, score: Tensor, counts: Tensor) -> tuple[float, float]:
    """Nats by which the curve `point` [1, 6] beats the likeliest one that is still rising at its top, and at its bottom.

    "Still rising" is a slope of SLOW, with which a tenth of the outermost twentieth of the rows would be of the other opinion.
    """
    centre, precision = CENTRE.repeat(2, 1), PRECISION.repeat(2, 1)
    centre[:, 5], precision[:, 5] = 0.0, FIXED
    for end, place in enumerate((4, 3)):
        centre[end, place], precision[end, place] = math.log(SLOW), FIXED
    middles = torch.tensor([-0.7, 0.0, 0.7], dtype=torch.float64)
    start = torch.cat([point, centre[:1]]).mean(0).repeat(2, 3, 1)
    start[..., 2], start[..., 3:] = middles, torch.where(precision == FIXED, centre, start[:, 0])[:, None, 3:]
    centre, precision = centre.repeat_interleave(3, 0), precision.repeat_interleave(3, 0)
    rising = fit_curves(score, counts.expand(6, -1, -1), start.reshape(6, 6), 30, centre, precision)
    best = log_likelihood(rising, score, counts).reshape(2, 3).amax(1)
    top, bottom = (log_likelihood(point, score, counts) - best).tolist()
    return top, bottom


def resample(counts: Tensor, draws: int, seed: int, cell: Tensor | None = None, cluster: Tensor | None = None) -> Tensor:
    """Bootstrap [D, ...] of `counts` [...]: a row is drawn Poisson(1) times, so a count of n rows is Poisson(n).

    With `cluster` [M] of the rows, and the flat `cell` [M] of `counts` that each row is in, whole clusters are drawn Poisson(1)
    times: rows of one user say less than as many rows of as many users. Beyond BUNCHES clusters, bunches of them are drawn,
    and totals vary more than their shares tell.
    """
    generator = torch.Generator().manual_seed(seed)
    if cell is None or cluster is None:
        return torch.poisson(counts.expand(draws, *counts.shape).contiguous(), generator=generator)
    found, place = torch.unique(cluster, return_inverse=True)
    bunch = torch.randperm(len(found), generator=generator)[place] % BUNCHES
    bunches = min(len(found), BUNCHES)
    table = torch.bincount(bunch * counts.numel() + cell, minlength=bunches * counts.numel()).reshape(bunches, -1)
    times = torch.poisson(torch.ones(draws, bunches, dtype=torch.float64), generator=generator)
    return (times @ table.double()).reshape(draws, *counts.shape)


def _eta(theta: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """+-(b |z - m|)^g [D, B], and log(b |z - m|) of it."""
    centred = score - theta[:, 2:3]
    left = centred < 0
    size = torch.where(left, theta[:, 3:4], theta[:, 4:5]) + centred.abs().clamp_min(1e-6).log()
    power = torch.exp(theta[:, 5:6].exp() * size).clamp(max=30.0)
    return torch.where(left, -power, power), size


def _curve(theta: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """P(r = 1 | z) [D, B] and its derivatives by theta [D, B, 6]."""
    low, high = torch.sigmoid(theta[:, :1]), 1 - torch.sigmoid(theta[:, 1:2])
    eta, size = _eta(theta, score)
    sure, power = torch.special.ndtr(eta), theta[:, 5:6].exp()
    density = (high - low) * torch.exp(-eta.square() / 2) / math.sqrt(2 * math.pi)
    left = score < theta[:, 2:3]
    distance = (score - theta[:, 2:3]).abs().clamp_min(1e-6)
    slope = (
        low * (1 - low) * (1 - sure),
        -high * (1 - high) * sure,
        (-density * power * eta.abs() / distance).clamp_min(-1e3),
        density * power * eta * left,
        density * power * eta * ~left,
        density * power * eta * size,
    )
    return (low + (high - low) * sure).clamp(TINY, 1 - TINY), torch.stack(slope, -1)


def log_likelihood(theta: Tensor, score: Tensor, counts: Tensor) -> Tensor:
    """Of `counts` [D, B, 2] under curves `theta` [D, 6]: [D] nats, up to a constant."""
    low, high = torch.sigmoid(theta[:, :1]), 1 - torch.sigmoid(theta[:, 1:2])
    prob = (low + (high - low) * sureness(theta, score)).clamp(TINY, 1 - TINY)
    return (counts[..., 1] * prob.log() + counts[..., 0] * (1 - prob).log()).sum(-1)


def _cost(theta: Tensor, score: Tensor, counts: Tensor, centre: Tensor, precision: Tensor) -> Tensor:
    return ((theta - centre).square() * precision).sum(-1) / 2 - log_likelihood(theta, score, counts)


def _starts() -> Tensor:
    middles, slopes = (-0.7, 0.0, 0.7), (0.5, 1.5)
    return torch.tensor([(-1.5, -1.5, m, a, b, 0.0) for m in middles for a in slopes for b in slopes], dtype=torch.float64)
