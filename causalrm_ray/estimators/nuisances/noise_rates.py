"""Rates of the noise from the log alone: rows so clearly liked or disliked that what contradicts is noise.

anchors                 the paper's: extremes of a calibrated proxy; estimate_by_anchors adds intervals
estimate_noise_rates    the flat ends of the labels' curve along the proxy's ranks (noise_curve), with bootstrap intervals
noise_rates_by          the same per group, drawn together as far as the groups' own rows leave doubt
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from causalrm_ray.checks import check_same_length, check_unit_interval
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_curve import (
    RHO_01,
    RHO_10,
    Ranks,
    evidence_of_flat_ends,
    fit_curves,
    rank_feedback,
    sureness,
)
from causalrm_ray.metrics import quantiles
from causalrm_ray.types import NoiseRates

QUANTILE = 0.03  # of the paper's anchors
OUTER = 0.1  # share of the rows at either end that must hold labels
MIN_ANCHORS = 10  # the fewest labels that a rate is estimated from
MIN_GROUP = 50  # rows with feedback, below which a group has no curve of its own
WIDEST = 0.3  # share of the rows at either end beyond which they are no anchors any more
SURE = 0.01  # a row whose opinion is as sure as this is an anchor
EVIDENCE = 2.0  # nats, about a 95 % likelihood-ratio test, by which a flat end must be likelier than one still rising
WIDE = 0.2  # width of an interval that a warning names
LARGEST = 1.5  # standard deviation of the logits of groups' rates
NORMAL = 1.96  # standard errors either side of a 95 % interval


@dataclass(frozen=True)
class NoiseEstimate:
    """Estimated rates, a 95 % interval (low, high) for each, the rows with feedback that each rests on, and warnings."""

    rates: NoiseRates
    rho_01_interval: tuple[float, float]
    rho_10_interval: tuple[float, float]
    rho_01_anchors: int
    rho_10_anchors: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Curves:
    """Curve [1, 6] of a log and those of its resamples [D, 6] (see noise_curve), the `ranks` and `counts` [B, 2] behind it."""

    ranks: Ranks
    counts: Tensor
    point: Tensor
    draws: Tensor

    def logits(self) -> Tensor:
        """Logit of (rho_01, rho_10) and the bootstrap's standard errors, [2, 2]."""
        places = [RHO_01, RHO_10]
        logit = self.point[0, places]
        # Where no label contradicts, all draws agree: half a flip among half of the labels is what can be excluded.
        least = (self.counts.sum() / 2 * torch.sigmoid(logit) + 0.5).rsqrt()
        return torch.stack([logit, self.draws[:, places].std(0).maximum(least)])


def anchors(prob: Tensor) -> NoiseRates:
    """Rates as published: the extremes of a proxy of P(r = 1 | x) over all impressions.

        rho_01 = 1 - Q_{1 - q}(prob),   rho_10 = Q_q(prob)

    Right if some rows are surely liked and some surely disliked (weak separability) AND the proxy is calibrated there; a proxy
    drawn to the middle makes both too big. `prob` [N] in [0, 1]; q = QUANTILE. arXiv 2603.18736, section on
    noise rates. Raises InputError if the rates would sum to 1 or more.
    """
    check_unit_interval("prob", prob)
    low, high = quantiles(prob, [QUANTILE, 1 - QUANTILE])
    return _rates(1 - high, low)


def estimate_by_anchors(prob: Tensor, observations: Observations) -> NoiseEstimate:
    """`anchors`, with what a NoiseEstimate holds besides: the feedback beyond either quantile, and intervals of the quantiles.

    `prob` [N] must be out of fold and calibrated. The intervals are distribution-free, from order statistics; the proxy's own
    error, which is the larger part, is not in them. Raises InputError if the rates would sum to 1 or more.
    """
    check_same_length(prob=prob, o=observations.o)
    rates = anchors(prob)
    spread = NORMAL * math.sqrt(QUANTILE * (1 - QUANTILE) / len(prob))
    ends = [max(QUANTILE - spread, 0.0), min(QUANTILE + spread, 1.0)]
    low, high = quantiles(prob, ends), [1 - value for value in quantiles(prob, [1 - end for end in ends])]
    top, bottom = (int(observations.o[beyond].sum()) for beyond in (prob >= 1 - rates.rho_01, prob <= rates.rho_10))
    return NoiseEstimate(rates, (high[0], high[1]), (low[0], low[1]), top, bottom)


def estimate_noise_rates(prob: Tensor, observations: Observations, draws: int = 1000, seed: int = 0) -> NoiseEstimate:
    """Rates from all feedback in the order of a proxy, with bootstrap intervals.

    A curve of P(r = 1 | rank, o = 1) with flat ends of unknown lengths is fitted to the labels (noise_curve); its ends are
    rho_10 and 1 - rho_01. The proxy only ranks the rows, so it need not be calibrated: unlike `anchors`, this is not inflated by
    a proxy drawn to the middle, nor by wrong rows among the anchors, nor, as the labels of rows with feedback are compared among
    themselves, by selection. Right where noise depends on the opinion only, and the ends of the proxy reach rows that are all
    liked, and all disliked, or come so near that the curve's shape shows the rest. `prob` [N] must be out of fold, or it would
    rank rows by their own labels. Intervals: the curve, lengths of the ends included, is refitted to `draws` bootstrap samples;
    Gaussian on the logit. `warnings` say where the ends are not flat, or rows are too few.
    One log cannot distinguish rows that are sure from rows that are all equally unsure.
    Raises InputError if the outer OUTER of the impressions, or up to WIDEST of them, hold fewer than MIN_ANCHORS with
    feedback, or if the rates sum to 1 or more.
    """
    check_unit_interval("prob", prob)
    check_same_length(prob=prob, o=observations.o)
    top = observations.r[_anchor_rows("top", -prob, observations.o)].double().mean()
    bottom = observations.r[_anchor_rows("bottom", prob, observations.o)].double().mean()
    _rates(1 - float(top), float(bottom))  # the plain shares: a proxy that does not separate these has no curve
    curves = fit_label_curves(prob, observations, draws, seed)
    return _from_curve(curves, *curves.logits())


def fit_label_curves(
    prob: Tensor, observations: Observations, draws: int = 1000, seed: int = 0, among: Tensor | None = None
) -> Curves:
    """The curve behind `estimate_noise_rates`, of the rows in the mask `among` [N] only if given; ValueError for draws < 2."""
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    ranks = rank_feedback(prob, observations, among)
    label = observations.r[ranks.rows].long()
    counts, drawn = ranks.counts(label, 2), ranks.resample(label, 2, draws, seed, observations.cluster)
    point = fit_curves(ranks.score, counts[None])
    return Curves(ranks, counts, point, fit_curves(ranks.score, drawn, point))


def noise_rates_by(
    prob: Tensor, observations: Observations, groups: Tensor, names: Sequence[str], draws: int = 500, seed: int = 0
) -> dict[str, NoiseEstimate]:
    """Rates of each group of rows, `groups` [N] in 0..len(names) - 1, as `estimate_noise_rates` and drawn together.

    Logits of a rate are taken as normal around a mean of all groups (see `shrink`): an estimate moves to the mean the more, the
    larger its own error is next to what the groups differ by. A group of fewer than MIN_GROUP rows with feedback,
    or without MIN_ANCHORS of each label among them, gets the mean, with an interval as wide as groups differ. `warnings` say
    where less than half of a rate is the group's own. Raises as `estimate_noise_rates`, and ValueError for a group without a
    name.
    """
    check_same_length(groups=groups, o=observations.o)
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(names):
        raise ValueError(f"groups must be in 0..{len(names) - 1}, got {int(groups.min())}..{int(groups.max())}")
    pooled = estimate_noise_rates(prob, observations, draws=draws, seed=seed)
    fits, labels = {}, {}
    for number, name in enumerate(names):
        among = (groups == number) & (observations.o == 1)
        labels[name], liked = int(among.sum()), int(observations.r[among].sum())
        if labels[name] >= MIN_GROUP and MIN_ANCHORS <= liked <= labels[name] - MIN_ANCHORS:
            fit = fit_label_curves(prob, observations, draws, seed, among)
            if float(torch.sigmoid(fit.logits()[0]).sum()) < 1:
                fits[name] = fit
    if not fits:
        few = f"no group has rows for rates of its own (one with {MIN_GROUP} labels of both kinds is asked): those of all rows"
        return {name: replace(pooled, warnings=(*pooled.warnings, few)) for name in names}
    found = torch.stack([fit.logits() for fit in fits.values()])  # [G, value and error, rate]
    logit, error, own, mean, spread = shrink(found[:, 0], found[:, 1])
    few = "too few rows for rates of its own ({} with feedback): what the other groups share"
    estimates = {name: replace(_estimate(mean, spread, (0, 0)), warnings=(few.format(labels[name]),)) for name in names}
    for place, (name, fit) in enumerate(fits.items()):
        estimate = _from_curve(fit, logit[place], error[place])
        borrowed = (
            f"{rate}: {share:.0%} from the group's own {labels[name]} rows with feedback, the rest from what all groups share"
            for rate, share in zip(("rho_01", "rho_10"), own[place].tolist(), strict=True)
            if share < 0.5
        )
        estimates[name] = replace(estimate, warnings=(*borrowed, *estimate.warnings))
    return estimates


def shrink(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Estimates `value` [G, K] with standard errors `error` [G, K] > 0, drawn to their mean by a hierarchical model, per column.

        value_g ~ N(theta_g, error_g^2),   theta_g ~ N(mean, t^2),   mean flat, t uniform in 0..LARGEST    (Gelman 2006)

    Given t, theta_g is own value_g + (1 - own) mean with own = t^2 / (t^2 + error_g^2); t is averaged over by its likelihood on
    a grid. One group alone stays as it is. Returns the values, their errors and own, [G, K] each, and the mean and the error
    [K] of an unknown group.
    """
    if len(value) == 1:
        return value, error, torch.ones_like(value), value[0], error[0]
    between = torch.linspace(0, LARGEST, 100, dtype=value.dtype).square()[:, None, None]  # [T, 1, 1]
    weight = 1 / (error.square() + between)  # [T, G, K]
    mean_variance = 1 / weight.sum(1, keepdim=True)
    mean = (weight * value).sum(1, keepdim=True) * mean_variance
    likelihood = (weight.log() - weight * (value - mean).square()).sum(1) / 2 + mean_variance[:, 0].log() / 2
    share = torch.softmax(likelihood, 0)[:, None]  # of each t
    own = between / (between + error.square())
    theta, variance = own * value + (1 - own) * mean, own * error.square() + (1 - own).square() * mean_variance
    centre, common = (share * theta).sum(0), (share * mean).sum(0)[0]
    spread = (share * (variance + (theta - centre).square())).sum(0).sqrt()
    unknown = (share * (between + mean_variance + (mean - common).square())).sum(0)[0].sqrt()
    return centre, spread, (share * own).sum(0), common, unknown


def _from_curve(curves: Curves, logit: Tensor, error: Tensor) -> NoiseEstimate:
    """Rates with logits [2] and standard errors [2], the rows that the curve rests on, and what is doubtful."""
    score, rows = curves.ranks.score, curves.counts.sum(1)
    sure = sureness(curves.point, score)[0]
    estimate = _estimate(logit, error, (int(rows[sure >= 1 - SURE].sum()), int(rows[sure <= SURE].sum())))
    return replace(estimate, warnings=_doubts(estimate, *evidence_of_flat_ends(curves.point, score, curves.counts)))


def _estimate(logit: Tensor, error: Tensor, anchor_rows: tuple[int, int]) -> NoiseEstimate:
    """Rates (rho_01, rho_10) from their logits [2] and standard errors [2]; the intervals are Gaussian on the logit."""
    rho_01, rho_10 = torch.sigmoid(logit).tolist()
    low, high = (torch.sigmoid(logit + side * NORMAL * error).tolist() for side in (-1, 1))
    return NoiseEstimate(_rates(rho_01, rho_10), (low[0], high[0]), (low[1], high[1]), *anchor_rows)


def _doubts(estimate: NoiseEstimate, top: float, bottom: float) -> tuple[str, ...]:
    """Sentences on what is doubtful; `top` and `bottom` are the nats of evidence for flat ends."""
    ends = (
        ("rho_01", "liked", "top", top, estimate.rho_01_interval, estimate.rho_01_anchors),
        ("rho_10", "disliked", "bottom", bottom, estimate.rho_10_interval, estimate.rho_10_anchors),
    )
    sentences = []
    for name, opinion, end, evidence, (low, high), rows in ends:
        if evidence < EVIDENCE:
            sentences.append(
                f"{name} may be too big: at the {end} end labels need not have settled (evidence {evidence:.1f} nats, "
                f"at least {EVIDENCE:.0f} is wanted), so perhaps no rows are surely {opinion}"
            )
        if high - low > WIDE:
            sentences.append(f"{name} lies anywhere in {low:.2f}..{high:.2f}: too few rows, {rows} of them surely {opinion}")
    if estimate.rho_01_interval[1] + estimate.rho_10_interval[1] >= 1:
        sentences.append(
            f"the ends may not differ: intervals of rho_01 up to {estimate.rho_01_interval[1]:.2f} and of rho_10 up to "
            f"{estimate.rho_10_interval[1]:.2f} reach a sum of 1"
        )
    return tuple(sentences)


def _anchor_rows(end: str, prob: Tensor, o: Tensor) -> Tensor:
    """Mask [N] of the rows with feedback among the lowest `prob`, ties included."""
    ascending, order = prob.double().sort()
    seen = o[order].cumsum(0)
    reach = max(math.ceil(OUTER * len(prob)), int((seen < MIN_ANCHORS).sum()) + 1)
    if reach > WIDEST * len(prob):
        found = int(seen[math.floor(WIDEST * len(prob)) - 1])
        raise InputError(f"anchors: the {end} {WIDEST:.0%} must hold {MIN_ANCHORS} rows with feedback, got {found}")
    return (o == 1) & (prob.double() <= ascending[reach - 1])


def _rates(rho_01: float, rho_10: float) -> NoiseRates:
    if rho_01 + rho_10 >= 1:
        raise InputError(
            f"noise rates: rho_01 + rho_10 must be below 1, got estimates of {rho_01:.4f} + {rho_10:.4f}: the feedback on the "
            "best rows is no better than that on the worst. Give known rates as reward.rho=[RHO_01,RHO_10], estimate them "
            "in another way (reward.noise_rates=curve or anchors), or use a method that finds its own (reward.method=auto)"
        )
    return NoiseRates(rho_01, rho_10)
