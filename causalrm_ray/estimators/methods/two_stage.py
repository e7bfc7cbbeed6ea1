"""Selection by features only: who gives feedback, and what it says, modelled apart (see mechanisms).

P(o = 1 | x, stratum) on all rows        P(r = 1 | x, o = 1) on those with feedback, by neural heads or trees, through the noise
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.boosting import BoostedMembers, fit_members
from causalrm_ray.estimators.core.frozen import with_settings
from causalrm_ray.estimators.core.members import Folds, cross_fit_members
from causalrm_ray.estimators.core.task import FitTask
from causalrm_ray.estimators.core.training import FitReport, predict
from causalrm_ray.estimators.methods.mechanisms import FEW_LABELS, Mechanism, WithStrata, starting_scorer, strata_of
from causalrm_ray.estimators.methods.outcome_models import FeedbackByFeatures, NoisyLabel, logit
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import Ensemble, to_logit
from causalrm_ray.types import NoiseRates


def fit_features(task: FitTask) -> tuple[Mechanism, Tensor]:
    """Two stages: P(o | x, stratum) on all rows, P(r | x, o = 1) on those with feedback; also the first's likelihood, [M]."""
    o = task.observations.o
    propensity, _ = starting_scorer(task)
    folds = Folds(task, len(propensity.bias))
    least = 0.5 / len(folds.learn)  # half a row: all may have feedback
    propensity.start_at(logit(min(max(float(o[folds.learn].mean()), least), 1 - least)))

    def risk(output: Tensor, index: Tensor) -> Tensor:
        return bce(output, o[index].unsqueeze(1).expand_as(output))

    strata = strata_of(task)
    with_strata = replace(with_settings(task, len(folds.learn)), inputs=WithStrata(task.inputs, strata))
    levels = FeedbackByFeatures(propensity, int(strata.max()) + 1)

    def prior() -> Tensor:
        return levels.penalty().cpu() / len(folds.learn)

    feedback = cross_fit_members(with_strata, levels, risk, folds, torch.arange(len(o)), prior, "start")
    said = _fit_noisy_label(task, folds, feedback.rows)
    nll = feedback.risk.clone()
    nll[o[feedback.rows] == 1] += said.risk
    share = folds.out_of_fold(torch.sigmoid(feedback.output), feedback.rows)
    joint = share.unsqueeze(1) * torch.stack([said.opinion, 1 - said.opinion], dim=1)
    return Mechanism(said.scorer, said.rates, feedback.rows, nll, said.opinion, joint, said.report), feedback.risk


@dataclass(frozen=True, eq=False)
class _Said:
    """What feedback says, modelled: out of fold, the `opinion` [M] of all rows and the cross-entropy `risk` of those with it."""

    scorer: Ensemble
    rates: NoiseRates
    opinion: Tensor
    risk: Tensor
    report: FitReport


def _fit_noisy_label(task: FitTask, folds: Folds, rows: Tensor) -> _Said:
    """P(r | x, o = 1) through the noise channel, by neural heads or trees, as `task.head` says or held-out feedback does."""
    o, r = task.observations.o, task.observations.r
    scorer, _ = starting_scorer(task)
    module = NoisyLabel(scorer, task.nuisances.rates)
    labelled = int(o[folds.learn].sum())

    def risk(output: Tensor, index: Tensor) -> Tensor:
        label = r[index].unsqueeze(1).expand(-1, output.shape[1])
        return o[index].unsqueeze(1) * nn.functional.binary_cross_entropy(output[:, :, 0], label, reduction="none")

    def prior() -> Tensor:
        return module.noise.penalty().cpu() / labelled

    seen = (o == 1).nonzero()[:, 0]
    labels = cross_fit_members(with_settings(task, labelled), module, risk, folds, seen, prior, "rival")
    rates = module.noise.means()
    trees = _trees(task, folds, labels.rows, rows, labels.risk)
    if trees is not None:
        label = r[labels.rows]
        unseen = bce(to_logit(trees.label[torch.isin(rows, labels.rows)]), label)
        return _Said(trees.scorer(rates), rates, trees.opinion(rates), unseen, labels.report)
    opinion = folds.out_of_fold(predict(module, task.inputs, rows, shard=task.shard), rows)[:, 1]
    return _Said(scorer, rates, opinion, labels.risk, labels.report)


def _trees(task: FitTask, folds: Folds, seen: Tensor, rows: Tensor, risk: Tensor) -> BoostedMembers | None:
    """Trees of what feedback on the rows `seen` says, if they are asked for, or if the choice is free and they do better.

    Where a backbone learns from the teacher, states are no columns of a table, and only what was asked for is fitted.
    """
    if task.head == "boosting":
        return fit_members(task, folds, seen, rows)
    rarest = int(torch.bincount(task.observations.r[seen].long(), minlength=2).min())
    if task.head is not None or task.spare_heldout or len(seen) < FEW_LABELS or rarest < 2 * folds.members:
        return None
    return fit_members(task, folds, seen, rows, risk)
