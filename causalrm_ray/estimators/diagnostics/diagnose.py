"""Can the result of a fit be trusted, and what would overturn it? Numbers for a report; nothing is fitted here.

overlap, weights                who gives feedback, and how much each counts
calibration                     the model's P(r* = 1 | x) against held-out feedback
sensitivity to rho, to Gamma    what becomes of the mean preference, the risk and the ranking if a nuisance is wrong
intervals                       of noise rates and E[r*], by a method that models who gives feedback (see intervals)
mechanisms                      what decides who gives feedback, by the log (see selection)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from causalrm_ray.checks import check_same_length
from causalrm_ray.estimators.core.clusters import numbered, summed
from causalrm_ray.estimators.core.task import Nuisances, Observations
from causalrm_ray.estimators.diagnostics.intervals import FitIntervals, RateEnds, draw_rates, fit_intervals, rate_ends
from causalrm_ray.estimators.diagnostics.selection import Mechanisms, mechanisms
from causalrm_ray.estimators.diagnostics.selection_posterior import explained
from causalrm_ray.estimators.nuisances.propensity import QUANTILES, effective_sample_size
from causalrm_ray.estimators.pipeline import RewardFits, heldout_objective
from causalrm_ray.losses.pointwise import LOSSES
from causalrm_ray.losses.reweighted import snips_weights
from causalrm_ray.losses.selection import class_weights
from causalrm_ray.losses.sensitivity import corrected_label, hidden_selection_weights, largest_mean, sign_change
from causalrm_ray.metrics import better_half, quantiles
from causalrm_ray.types import NoiseRates

BINS = 20  # of a histogram
BIN_ROWS = 20  # rows with feedback that a bin of a calibration curve should hold
RHO_GRID = (0.0, 0.1, 0.2, 0.3, 0.4)
GAMMAS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
DRAWS = 200  # of a bootstrap


@dataclass(frozen=True)
class Overlap:
    """Counts of rows by propensity, in bins between `edges` (one more than counts); smallest and largest propensity."""

    edges: tuple[float, ...]
    with_feedback: tuple[int, ...]
    without_feedback: tuple[int, ...]
    smallest: float
    largest: float


@dataclass(frozen=True)
class WeightSpread:
    """Weights 1 / p of the rows with feedback, scaled to mean 1.

    `quantiles` at propensity.QUANTILES; `counts` between `edges`; `largest_share` of all weight lies on one row; `ess` rows and
    `ess_fraction` of the `rows` with feedback.
    """

    rows: int
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    largest_share: float
    ess: float
    ess_fraction: float


@dataclass(frozen=True)
class LabelBin:
    """Rows of alike predictions of P(r* = 1 | x): weighted means of prediction and corrected label, its standard error."""

    predicted: float
    actual: float
    stderr: float
    rows: int


@dataclass(frozen=True)
class RhoPoint:
    """Under these rates: E[r*] over all impressions, outside [0, 1] if the log contradicts them, and the held-out risk."""

    rho_01: float
    rho_10: float
    preference: float
    risk: float


@dataclass(frozen=True)
class RhoSensitivity:
    """At the rates used, at the corners of their intervals (empty where they were given), and on RHO_GRID squared."""

    estimate: RhoPoint
    corners: tuple[RhoPoint, ...]
    grid: tuple[RhoPoint, ...]


@dataclass(frozen=True)
class GammaBounds:
    """E[r*] if hidden selection moves odds by up to `gamma`: exact bounds, and a 95 % bootstrap interval around them."""

    gamma: float
    low: float
    high: float
    low_95: float
    high_95: float


@dataclass(frozen=True)
class Ranking:
    """E[r*] of the better half of held-out rows by score minus that of the worse; `gamma` that could have made it all.

    `gamma` is None if not even losses.sensitivity.sign_change's limit could; `rows` with feedback.
    """

    contrast: float
    stderr: float
    gamma: float | None
    rows: int


@dataclass(frozen=True)
class FitDiagnostics:
    """Of the model of `method`; `dataclasses.asdict` gives its JSON. None where the log or the method has none."""

    method: str
    overlap: Overlap
    weights: WeightSpread
    calibration: tuple[LabelBin, ...]
    rho: RhoSensitivity
    gamma: tuple[GammaBounds, ...]
    ranking: Ranking | None
    mechanisms: Mechanisms | None
    intervals: FitIntervals | None = field(default=None, kw_only=True)  # an earlier version did not save them


def diagnose_fit(
    fits: RewardFits,
    method: str,
    observations: Observations,
    propensity: Tensor,
    logit: Tensor,
    loss: str = "bce",
    seed: int = 0,
    strata: Tensor | None = None,
) -> FitDiagnostics:
    """Diagnostics of the model that `method` fitted.

    `propensity` [N] as the fit was given it; `logit` [M] of that model on the M rows `fits.heldout`; `loss` a key of LOSSES;
    `seed` of the bootstrap; `strata` [N] as the fit was given them. What speaks of the model rests on held-out rows, what speaks
    of the log on all.
    """
    check_same_length(heldout=fits.heldout, logit=logit)
    check_same_length(o=observations.o, propensity=propensity)
    held = observations.o[fits.heldout] == 1
    rows = fits.heldout[held]
    score = torch.sigmoid(logit.double())
    label = corrected_label(observations.r[rows], fits.rates)
    log = explained(fits, method)
    intervals = None if log is None else fit_intervals(log, observations, strata)
    ends = rate_ends(fits.rates, fits.noise, intervals)
    return FitDiagnostics(
        method=method,
        overlap=overlap(propensity, observations.o),
        weights=weight_spread(propensity[observations.o == 1]),
        calibration=reward_calibration(score[held], label, propensity[rows], observations.clusters(rows)),
        rho=rho_sensitivity(fits, observations, propensity, logit, loss),
        gamma=gamma_sensitivity(observations, propensity, fits.rates, seed, ends=ends),
        ranking=ranking(label, propensity[rows], better_half(score)[held], observations.clusters(rows)),
        mechanisms=mechanisms(fits.fits[method].figures),
        intervals=intervals,
    )


def overlap(propensity: Tensor, o: Tensor) -> Overlap:
    """Who could have given feedback: `propensity` [N] in (0, 1] of rows with and without (`o` [N])."""
    top = float(propensity.max())
    counts = [torch.histc(propensity[o == value].float(), BINS, 0.0, top).int().tolist() for value in (1, 0)]
    edges = torch.linspace(0, top, BINS + 1).tolist()
    return Overlap(tuple(edges), tuple(counts[0]), tuple(counts[1]), float(propensity.min()), top)


def weight_spread(propensity: Tensor) -> WeightSpread:
    """How unevenly rows with feedback count, from their `propensity` [M] in (0, 1], M >= 1."""
    weight = snips_weights(torch.ones(len(propensity), dtype=torch.float64), propensity.double())
    ess, top = effective_sample_size(weight), float(weight.max())
    return WeightSpread(
        rows=len(weight),
        quantiles=tuple(quantiles(weight, QUANTILES)),
        edges=tuple(torch.linspace(0, top, BINS + 1).tolist()),
        counts=tuple(torch.histc(weight, BINS, 0.0, top).int().tolist()),
        largest_share=top / len(weight),
        ess=ess,
        ess_fraction=ess / len(weight),
    )


def reward_calibration(
    predicted: Tensor, label: Tensor, propensity: Tensor, cluster: Tensor | None = None
) -> tuple[LabelBin, ...]:
    """Predictions [M] of P(r* = 1 | x) against corrected labels [M], in at most five bins of equally many rows.

    Both means weigh rows by 1 / p, so that a bin speaks of all impressions in it. Standard error of a ratio: sqrt(sum w^2
    (y - mean)^2 + s) / sum w, where s is what half a row of each label would add, so that rows that agree are no certainty;
    residuals of one `cluster` [M] are added up before they are squared.
    """
    check_same_length(predicted=predicted, label=label, propensity=propensity)
    bins = min(5, max(1, len(label) // BIN_ROWS))
    half = 0.5 * float((label.max() - label.min()).square())
    curve = []
    for part in predicted.argsort(stable=True).tensor_split(bins):
        actual, stderr = _mean(label[part], propensity[part], None if cluster is None else cluster[part])
        stderr = (stderr**2 + half / len(part) ** 2) ** 0.5
        curve.append(LabelBin(_mean(predicted[part], propensity[part])[0], actual, stderr, len(part)))
    return tuple(curve)


def rho_sensitivity(
    fits: RewardFits, observations: Observations, propensity: Tensor, logit: Tensor, loss: str = "bce"
) -> RhoSensitivity:
    """Mean preference, sum v_1 / sum (v_1 + v_0) by the fit's own selection model (losses.selection.class_weights), and held-out
    risk of a model with `logit` [M] on `fits.heldout`, had the rates been others; no refit."""
    selection = fits.selection or (propensity, propensity)

    def point(rho_01: float, rho_10: float) -> RhoPoint:
        rates = NoiseRates(rho_01, rho_10)
        v1, v0 = (weight.double().mean() for weight in class_weights(observations.o, observations.r, *selection, rates))
        preference = float(v1 / (v1 + v0).clamp_min(0.5))
        objective = heldout_objective(observations, Nuisances(propensity, rates), LOSSES[loss], fits.heldout, fits.selection)
        at = torch.isin(fits.heldout, objective.rows)
        return RhoPoint(rho_01, rho_10, preference, float(objective.risk(logit[at], fits.heldout[at]).double().mean()))

    noise = fits.noise
    ends = itertools.product(noise.rho_01_interval, noise.rho_10_interval) if noise else ()
    return RhoSensitivity(
        estimate=point(fits.rates.rho_01, fits.rates.rho_10),
        corners=tuple(point(*rates) for rates in ends if sum(rates) < 1),
        grid=tuple(point(*rates) for rates in itertools.product(RHO_GRID, RHO_GRID)),
    )


def gamma_sensitivity(
    observations: Observations,
    propensity: Tensor,
    rates: NoiseRates,
    seed: int = 0,
    draws: int = DRAWS,
    ends: RateEnds | None = None,
) -> tuple[GammaBounds, ...]:
    """E[r*] over all impressions under hidden selection of each strength in GAMMAS.

    The interval is from the 2.5 % quantile of the lower bound to the 97.5 % one of the upper, over bootstrap samples of the rows
    with feedback (Zhao et al. 2019, section 4.3), clusters of them together, each with rates drawn from their intervals, `ends`
    (see intervals.rate_ends; where these have none, the rates stay as they are); the propensity stays as it is.
    """
    seen = observations.o == 1
    least, most = hidden_selection_weights(propensity[seen], torch.tensor(GAMMAS))
    kind, cluster = one_hot(observations.r[seen].long(), 2).double(), observations.clusters(seen)
    rows = len(kind)
    unit, units = (torch.arange(rows), rows) if cluster is None else numbered(cluster)  # what is drawn

    def bounds(count: Tensor, rates: NoiseRates) -> Tensor:  # times that each row is taken -> low and high [2, G]
        taken = count.double().unsqueeze(1) * kind  # two labels: their sums of weights suffice
        label = corrected_label(torch.tensor([0.0, 1.0], dtype=torch.float64), rates)
        return torch.stack([-largest_mean(-label, least @ taken, most @ taken), largest_mean(label, least @ taken, most @ taken)])

    low, high = bounds(torch.ones(rows), rates)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for possible in draw_rates(rates, ends or {}, draws, generator):
        count = torch.bincount(torch.randint(units, (units,), generator=generator), minlength=units)[unit]
        drawn.append(bounds(count, possible))
    low_95, high_95 = (torch.stack(drawn)[:, side].quantile(end, 0) for side, end in enumerate((0.025, 0.975)))
    figures = zip(GAMMAS, low.tolist(), high.tolist(), low_95.tolist(), high_95.tolist(), strict=True)
    return tuple(GammaBounds(*row) for row in figures)


def ranking(label: Tensor, propensity: Tensor, top: Tensor, cluster: Tensor | None = None) -> Ranking | None:
    """How much better the rows `top` (a mask) are than the others; None if either group has no feedback.

    `label` [M] corrected, `propensity` [M] and `cluster` [M], of rows with feedback.
    """
    if not bool(top.any()) or bool(top.all()):
        return None
    (upper, upper_se), (lower, lower_se) = (
        _mean(label[group], propensity[group], None if cluster is None else cluster[group]) for group in (top, ~top)
    )
    stderr = (upper_se**2 + lower_se**2) ** 0.5
    return Ranking(upper - lower, stderr, sign_change(label, propensity, top), len(label))


def _mean(value: Tensor, propensity: Tensor, cluster: Tensor | None = None) -> tuple[float, float]:
    """Self-normalised mean of `value` [M] and its standard error, that of sums over clusters where these are given."""
    weight = snips_weights(torch.ones(len(value), dtype=torch.float64), propensity.double())
    mean = (weight * value.double()).mean()
    return float(mean), float(summed(weight * (value.double() - mean), cluster).square().sum().sqrt() / len(value))
