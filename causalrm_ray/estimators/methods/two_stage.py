"""Selection by features only: who gives feedback, and what it says, modelled apart (see mechanisms).

P(o = 1 | x, stratum) on all rows        P(r = 1 | x, o = 1) on those with feedback, by neural heads or trees, through the noise
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.boosting import LabelModel, fit_members
from causalrm_ray.estimators.core.frozen import with_settings
from causalrm_ray.estimators.core.members import Folds, cross_fit_members
from causalrm_ray.estimators.core.task import FitTask
from causalrm_ray.estimators.core.training import predict
from causalrm_ray.estimators.methods.mechanisms import Mechanism, WithStrata, starting_scorer, strata_of
from causalrm_ray.estimators.methods.outcome_models import FeedbackByFeatures, NoisyLabel, logit
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.types import NoiseRates

RARE_LABELS = 200  # of the rarer kind, from which on a log may choose trees


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
    said, rates = _fit_noisy_label(task, folds, feedback.rows)
    nll = feedback.risk.clone()
    nll[o[feedback.rows] == 1] += said.risk
    share = folds.out_of_fold(torch.sigmoid(feedback.output), feedback.rows)
    joint = share.unsqueeze(1) * torch.stack([said.opinion, 1 - said.opinion], dim=1)
    return Mechanism(said.scorer, rates, feedback.rows, nll, said.opinion, joint, said.report), feedback.risk


def _fit_noisy_label(task: FitTask, folds: Folds, rows: Tensor) -> tuple[LabelModel, NoiseRates]:
    """P(r | x, o = 1) by neural heads or trees, as `task.head` says or held-out feedback does; and the noise rates.

    Rates are those of the neural heads: trees take them as given.
    """
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
    rarest = int(torch.bincount(r[labels.rows].long(), minlength=2).min())
    trees = None
    if task.head == "boosting":
        trees = fit_members(task, folds, labels.rows, rows, rates)
    elif task.head is None and not task.spare_heldout and rarest >= RARE_LABELS:  # states of a backbone are no table
        trees = fit_members(task, folds, labels.rows, rows, rates, labels.risk)
    if trees is not None:
        return trees, rates
    opinion = folds.out_of_fold(predict(module, task.inputs, rows, shard=task.shard), rows)[:, 1]
    return LabelModel(scorer, opinion, labels.risk, labels.report), rates
