"""Gradient-boosted trees in place of neural heads, for features that are columns of a table (scikit-learn's, by histograms).

rows with feedback -> a member for each fold, as many trees as suit its fold best -> P(r* = 1 | x), out of fold
rows, weights      -> one member, as many trees as suit held-out rows best        -> a method that is a weighted risk
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from causalrm_ray.checks import check_both_classes
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.clusters import in_standard_errors
from causalrm_ray.estimators.core.members import Folds
from causalrm_ray.estimators.core.task import NOISE_FREE, FitTask, Fitted
from causalrm_ray.estimators.core.training import Epoch, FitReport, Objective
from causalrm_ray.losses.label_noise import forward_logit
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.losses.surrogate import invert
from causalrm_ray.models.scorers.heads import Ensemble, to_logit
from causalrm_ray.models.scorers.trees import from_boosting
from causalrm_ray.types import NoiseRates

BETTER = 2.0  # standard errors by which trees must lower the held-out risk of neural heads, where the log chooses


@dataclass(frozen=True, eq=False)
class LabelModel:
    """What feedback says, by an ensemble: P(r* = 1 | x) [M], `opinion`, out of fold, of the rows that were asked for, the
    cross-entropy `risk` [S] of the labels of those with feedback, and how training went, of trees a mean over members."""

    scorer: Ensemble
    opinion: Tensor
    risk: Tensor
    report: FitReport


def fit_members(
    task: FitTask, folds: Folds, seen: Tensor, rows: Tensor, rates: NoiseRates, rival: Tensor | None = None
) -> LabelModel | None:
    """Trees on the rows `seen` [S] with feedback, a member without each fold, and what they make of the `rows` [M] out of fold.

        P(r = 1 | x, o = 1) = rho_10 + (1 - rho_01 - rho_10) P(r* = 1 | x)

    with the noise `rates` as given; what trees say beyond it is taken to its ends. Where `rival` [S] is given, the cross-entropy
    of other heads out of fold, there are trees only if theirs is lower by BETTER standard errors; the first fold decides alone
    where theirs is not lower at all. Friedman 2001.
    Raises InputError for a fold without feedback, or without both kinds in the other folds.
    """
    own, label = folds.unseen(seen), task.observations.r
    for left_out in own.T:
        if not left_out.any() or len(label[seen[~left_out]].unique()) < 2:
            raise InputError(
                f"kind boosting needs feedback in each of {folds.members} folds and both kinds in any others, got "
                f"{len(seen)} labels, {int(label[seen].sum())} of them positive: use kind mlp"
            )
    models = []
    for member, left_out in enumerate(own.T):
        models.append(_grow(task, seen[~left_out], seen[left_out]))
        if member == 0 and rival is not None:
            said = _said(models[:1], task, own[:, :1][left_out], seen[left_out])
            if not float(_risk(_opinion(said, rates), rates, label[seen[left_out]]).mean()) < float(rival[left_out].mean()):
                return None
    opinion = _opinion(_said(models, task, folds.unseen(rows), rows), rates)
    risk = _risk(opinion[torch.isin(rows, seen)], rates, label[seen])
    if rival is not None and not float(in_standard_errors(rival - risk, task.observations.clusters(seen))) > BETTER:
        return None
    return LabelModel(from_boosting(models, rates), opinion, risk, _report(models))


def fit_weighted(task: FitTask, train: Objective, heldout: Objective) -> Fitted:
    """Trees at the minimum of a risk that is a sum of weight_i bce(logit_i, r_i) over rows, with weights >= 0.

    Raises ValueError for another loss than bce.
    """
    if task.loss is not bce:
        raise ValueError("trees minimise loss='bce', got another loss: use kind='mlp' or 'linear'")
    weights = (objective.risk(torch.zeros(len(objective.rows)), objective.rows) / math.log(2) for objective in (train, heldout))
    model = _grow(task, train.rows, heldout.rows, *weights)
    return Fitted(from_boosting([model], NOISE_FREE), _report([model]))


def _grow(
    task: FitTask, learn: Tensor, measure: Tensor, weight: Tensor | None = None, measure_weight: Tensor | None = None
) -> HistGradientBoostingClassifier:
    """Trees until ten more do not lower the risk of the rows `measure`; those beyond its minimum are cut off."""
    model = HistGradientBoostingClassifier(
        learning_rate=0.1,
        max_iter=400,
        max_leaf_nodes=16,
        l2_regularization=20.0,
        max_features=0.3,
        early_stopping=True,
        n_iter_no_change=10,
        random_state=task.settings.seed,
    )
    label = task.observations.r
    check_both_classes("r of the rows that trees learn from", label[learn])
    held: dict[str, Any] = {"X_val": _table(task, measure), "y_val": label[measure].numpy()}
    given = None if weight is None else weight.numpy()
    if measure_weight is not None:
        held["sample_weight_val"] = measure_weight.numpy()
    model.fit(_table(task, learn), label[learn].numpy(), given, **held)
    del vars(model)["_predictors"][_best(model) :]
    return model


def _best(model: HistGradientBoostingClassifier) -> int:
    """The number of trees, one at least, with which the rows that measure are likeliest; the first score is of none."""
    return max(int(np.argmax(model.validation_score_)), 1)


def _report(models: Sequence[HistGradientBoostingClassifier]) -> FitReport:
    """Mean risks over the models after each tree that all of them tried."""
    scores = ((model.train_score_, model.validation_score_) for model in models)
    number = min(len(model.train_score_) for model in models)
    mean = -np.mean([[train[1:number], unseen[1:number]] for train, unseen in scores], axis=0)
    epochs = tuple(Epoch(place, float(train), float(unseen)) for place, (train, unseen) in enumerate(mean.T, 1))
    return FitReport(epochs, min(epochs, key=lambda epoch: epoch.validation_risk))


def _said(models: Sequence[HistGradientBoostingClassifier], task: FitTask, unseen: Tensor, rows: Tensor) -> Tensor:
    """Mean P(r = 1 | x, o = 1) [M] of the models that never saw each of the `rows` [M], as `unseen` [M, K] has it."""
    total = torch.zeros(len(rows))
    for member, model in enumerate(models):
        own = unseen[:, member]
        total[own] += torch.from_numpy(model.predict_proba(_table(task, rows[own]))[:, 1]).float()
    return total / unseen.sum(1)


def _opinion(said: Tensor, rates: NoiseRates) -> Tensor:
    return torch.sigmoid(to_logit(invert(said, rates)))


def _risk(opinion: Tensor, rates: NoiseRates, label: Tensor) -> Tensor:
    return bce(forward_logit(to_logit(opinion), rates), label)


def _table(task: FitTask, rows: Tensor) -> np.ndarray:
    return cast(FeatureRows, task.inputs).features[rows].float().numpy(force=True)
