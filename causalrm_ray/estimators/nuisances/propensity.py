"""The one owner of propensities P(o = 1 | x): fit, calibrate, clip, warn.

cross_fit (raw, out of fold) -> calibrate (isotonic, out of fold; clipped below) -> Propensity with its report
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalrm_ray.checks import check_both_classes, check_finite, check_propensity, check_same_length, check_unit_interval
from causalrm_ray.estimators.core.folds import fold_of
from causalrm_ray.estimators.core.linear_start import fit_scorer
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, Inputs, Objective, predict, seeded
from causalrm_ray.estimators.nuisances.calibration import Calibration, cross_calibrate, fit_calibration
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.metrics import CalibrationBin, auroc, calibration_curve, ece, quantiles

HIGHEST_CLIP = 0.1  # as arXiv 2603.18736 clips
CLIP_SHARE = 0.25  # of the share of rows with feedback: where feedback is rare, 0.1 would touch most rows, and undo the weights
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class PropensityReport:
    """Can this log be reweighted? All figures are out of fold; `dataclasses.asdict` gives its JSON.

    `ece` in probability; `ess` rows is the effective sample size of the weights o / p, `ess_fraction` of the rows with feedback;
    `clipped_share` of all rows lay below `clip`; `mean_weight` is the mean of o / p over all rows, 1 where the weights add up to
    the whole log; `ece`, `curve` and the quantiles QUANTILES in `overlap` are of the propensity before clipping;
    `warnings` are sentences for the user.
    """

    rows: int
    observed: int
    mean: float
    auroc: float
    ece: float
    ess: float
    ess_fraction: float
    clip: float
    clipped_share: float
    overlap: tuple[float, ...]
    curve: tuple[CalibrationBin, ...]
    warnings: tuple[str, ...]
    mean_weight: float | None = None  # of one that was saved before it was reported


@dataclass(frozen=True, eq=False)
class Propensity:
    """`prob` [N] in [clip, 1], ready for weights; `calibration` maps raw probabilities of new rows; `clip` is the lowest used."""

    prob: Tensor
    calibration: Calibration
    clip: float
    report: PropensityReport


def cross_fit_logits(
    task: FitTask,
    objective: Callable[[Tensor], Objective],
    rows: Tensor,
    folds: int,
    fold_of_rows: Tensor | None = None,
) -> tuple[Tensor, list[nn.Module]]:
    """Logits [N] of the task's scorers, none by one that trained on its row, and the `folds` scorers.

    `objective(rows)` is the risk over some rows. Each of `rows` lies in one fold and gets the logit of the module that was
    trained on the other folds: `fold_of_rows` [M], or at random. All rows else are seen by no module and get the modules' mean
    logit; of these, the task's held-out ones decide when each module stops.
    """
    inputs, seed, stop = task.inputs, task.settings.seed, objective(task.heldout)
    fold = torch.full((len(inputs),), -1)
    cluster = task.observations.clusters(rows)
    fold[rows] = fold_of(len(rows), folds, seed, cluster) if fold_of_rows is None else fold_of_rows
    logit = torch.zeros(len(inputs))
    modules = []
    for number in range(folds):
        module = seeded(task.make_scorer, seed)
        fit_scorer(module, inputs, objective(rows[fold[rows] != number]), stop, task.settings, task.shard)
        unseen = ((fold == number) | (fold == -1)).nonzero()[:, 0]
        logit[unseen] += predict(module, inputs, unseen, shard=task.shard).float()
        modules.append(module)
    logit[fold == -1] /= folds
    return logit, modules


def cross_fit(
    make_module: Callable[[], nn.Module],
    inputs: Inputs,
    o: Tensor,
    settings: FitSettings,
    folds: int = 2,
    fold: Tensor | None = None,
) -> tuple[Tensor, list[nn.Module]]:
    """Raw probabilities of feedback [N], none by a model that trained on its row, and the `folds` >= 2 models.

    Fitted by cross-entropy on `o` [N] in {0, 1} over all impressions. A new row's raw probability is the models' mean.
    `fold` [N] in -1..folds-1 says which model leaves out which row, -1 which rows only decide when to stop (None: at random, a
    tenth to stop).
    Raises ValueError if `o` holds one class only: without a row of each kind there is nothing to learn a propensity from.
    """
    check_both_classes("o", o)
    target = o.to(torch.float32)
    if fold is None:
        rows, held_out = split_rows(torch.arange(len(o)), 0.1, settings.seed)
    else:
        rows, held_out = (fold >= 0).nonzero()[:, 0], (fold < 0).nonzero()[:, 0]
    task = FitTask(make_module, inputs, Observations(o, torch.zeros_like(o)), Nuisances(), rows, held_out, settings, bce)

    def objective(rows: Tensor) -> Objective:
        return Objective(rows, lambda logit, index: bce(logit, target[index]))

    logit, modules = cross_fit_logits(task, objective, rows, folds, None if fold is None else fold[rows])
    return torch.sigmoid(logit), modules


def lowest_weighted(clip: float | None, o: Tensor) -> float:
    """The lowest propensity used in a weight: `clip`, or a quarter of the share of `o` [N], at most the paper's 0.1."""
    return min(HIGHEST_CLIP, CLIP_SHARE * float(o.double().mean())) if clip is None else clip


def calibrate(
    raw: Tensor, o: Tensor, clip: float | None, folds: int = 5, seed: int = 0, cluster: Tensor | None = None
) -> Propensity:
    """Honest propensities from raw out-of-fold ones: isotonic, cross-fitted over `folds`, clipped below at `clip` in (0, 1), or
    where that is None at `lowest_weighted`.

    `raw` [N] in [0, 1], `o` [N] in {0, 1} with both classes; else ValueError. Rows of one `cluster` [N] share a fold.
    """
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"clip must be in (0, 1), got {clip}")
    check_same_length(raw=raw, o=o)
    check_unit_interval("raw", raw)
    check_both_classes("o", o)
    clip = lowest_weighted(clip, o)
    calibrated = cross_calibrate(raw, o, torch.ones(len(o), dtype=torch.bool), folds, seed, cluster=cluster)
    return Propensity(calibrated.clamp(min=clip), fit_calibration(raw, o), clip, diagnose(calibrated, o, clip))


def diagnose(prob: Tensor, o: Tensor, clip: float) -> PropensityReport:
    """Report on propensities `prob` [N] in [0, 1] before clipping, for `o` [N] in {0, 1}; the weights use max(prob, clip)."""
    check_same_length(prob=prob, o=o)
    check_unit_interval("prob", prob)
    check_both_classes("o", o)
    clipped = prob.clamp(min=clip)
    check_propensity("propensity", clipped)
    weights = o / clipped
    ess = effective_sample_size(weights[o == 1])
    observed = int((o == 1).sum())
    clipped_share = float((prob < clip).double().mean())
    error, mean_weight = ece(prob, o), float(weights.double().mean())
    return PropensityReport(
        rows=len(o),
        observed=observed,
        mean=float(prob.double().mean()),
        auroc=auroc(prob, o),
        ece=error,
        ess=ess,
        ess_fraction=ess / observed,
        clip=clip,
        clipped_share=clipped_share,
        mean_weight=mean_weight,
        overlap=tuple(quantiles(prob, QUANTILES)),
        curve=calibration_curve(prob, o),
        warnings=_warnings(ess / observed, clipped_share, error, float((prob > 0.99).double().mean()), mean_weight, clip),
    )


def effective_sample_size(weight: Tensor) -> float:
    """Rows of equal weight that would average as well (Kish): (sum w)^2 / sum w^2, for `weight` [N] >= 0, not all zero."""
    check_finite("weight", weight)
    if bool((weight < 0).any()) or not bool((weight > 0).any()):
        raise ValueError(f"weight must be >= 0 and not all zero, got {weight.tolist()[:4]}")
    total, squares = weight.double().sum(), weight.double().square().sum()
    return float(total.square() / squares)


def split_rows(rows: Tensor, held_out: float, seed: int, cluster: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(train, held-out) parts of `rows` [M] at random, `held_out` in (0, 1) being the second's share; both in ascending order.

    Rows of one `cluster` [M] go to one part: the share is then about that of the clusters too.
    """
    if cluster is not None:
        out = fold_of(len(rows), round(1 / held_out), seed, cluster) == 0
        return rows[~out].sort().values, rows[out].sort().values
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    cut = round(len(rows) * (1 - held_out))
    return order[:cut].sort().values, order[cut:].sort().values


def _warnings(
    ess_fraction: float, clipped_share: float, error: float, certain_share: float, mean_weight: float, clip: float
) -> tuple[str, ...]:
    faults = (
        (
            ess_fraction < 0.3,
            f"Few rows carry most weight: the effective sample is {ess_fraction:.0%} of the rows with feedback. "
            "Raise reward.clip, or collect feedback on more kinds of answers.",
        ),
        (
            clipped_share > 0.2,
            f"Poor overlap: {clipped_share:.0%} of the propensities lie below the clip, where weights are too small. "
            "Ask some users at random for feedback; a lower reward.clip trades this bias for variance.",
        ),
        (
            mean_weight < 0.9 and clipped_share > 0.05,
            f"The weights average {mean_weight:.2f} over the log, where 1 is right: the clip of {clip:.3g} takes weight from the "
            "rows that stand for most others. Lower reward.clip.",
        ),
        (
            error > 0.05,
            f"Propensities are off by {error:.3f} on average: the model of feedback does not fit. "
            "Check that the log holds all impressions, those without feedback too.",
        ),
        (
            certain_share > 0.2,
            f"Feedback is almost certain on {certain_share:.0%} of the rows: were impressions without feedback logged?",
        ),
    )
    return tuple(text for fault, text in faults if fault)
