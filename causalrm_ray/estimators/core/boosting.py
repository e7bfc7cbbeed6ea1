"""Gradient-boosted trees in place of neural heads, for features that are columns of a table (scikit-learn's, by histograms).

rows with feedback -> a member for each fold, which grows until its fold gains no more -> P(r = 1 | x, o = 1), out of fold
rows, weights      -> one member, which grows until held-out rows gain no more         -> a method that is a weighted risk
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
from causalrm_ray.estimators.core.clusters import in_standard_errors
from causalrm_ray.estimators.core.members import Folds
from causalrm_ray.estimators.core.task import NOISE_FREE, FitTask, Fitted
from causalrm_ray.estimators.core.training import Epoch, FitReport, Objective
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import to_logit
from causalrm_ray.models.scorers.trees import BoostedScorer, from_boosting
from causalrm_ray.types import NoiseRates

BETTER = 2.0  # standard errors by which trees must lower the held-out risk of neural heads, where the log chooses


@dataclass(frozen=True, eq=False)
class BoostedMembers:
    """A model for each fold; of the rows `rows` [M] P(r = 1 | x, o = 1) [M], `label`, out of fold."""

    models: list[HistGradientBoostingClassifier]
    label: Tensor

    def opinion(self, rates: NoiseRates) -> Tensor:
        """P(r* = 1 | x) [M] under these noise rates, kept within (0, 1)."""
        return torch.sigmoid(to_logit((self.label - rates.rho_10) / (1 - rates.rho_01 - rates.rho_10)))

    def scorer(self, rates: NoiseRates) -> BoostedScorer:
        """The scorer of P(r* = 1 | x)."""
        return from_boosting(self.models, rates)


def fit_members(task: FitTask, folds: Folds, seen: Tensor, rows: Tensor, risk: Tensor | None = None) -> BoostedMembers | None:
    """Trees on the rows `seen` [S] with feedback, a member without each fold; what they say of the `rows` [M], out of fold.

    Where `risk` [S] is given, the cross-entropy of other heads out of fold, there are trees only if theirs is lower by BETTER
    standard errors; the first fold decides alone where theirs is not lower at all. Friedman 2001.
    """
    own, label = folds.unseen(seen), task.observations.r
    models = []
    for member in range(folds.members):
        left_out = own[:, member]
        models.append(_grow(task, seen[~left_out], seen[left_out]))
        if member == 0 and risk is not None:
            first = bce(to_logit(_say(models[0], task, seen[left_out])), label[seen[left_out]])
            if not float(first.mean()) < float(risk[left_out].mean()):
                return None
    found = BoostedMembers(models, _out_of_fold(models, task, folds, rows))
    if risk is not None:
        gain = risk - bce(to_logit(found.label[torch.isin(rows, seen)]), label[seen])
        if not float(in_standard_errors(gain, task.observations.clusters(seen))) > BETTER:
            return None
    return found


def fit_weighted(task: FitTask, train: Objective, heldout: Objective) -> Fitted:
    """Trees at the minimum of a risk that is a sum of weight_i bce(logit_i, r_i) over rows, with weights >= 0.

    Raises ValueError for another loss than bce.
    """
    if task.loss is not bce:
        raise ValueError("trees minimise loss='bce', got another loss: use kind='mlp' or 'linear'")
    weights = (objective.risk(torch.zeros(len(objective.rows)), objective.rows) / math.log(2) for objective in (train, heldout))
    model = _grow(task, train.rows, heldout.rows, *weights)
    scores = zip(-model.train_score_, -model.validation_score_, strict=True)
    epochs = tuple(Epoch(number, float(risk), float(unseen)) for number, (risk, unseen) in enumerate(scores, 1))
    report = FitReport(epochs, min(epochs, key=lambda epoch: epoch.validation_risk))
    return Fitted(from_boosting([model], NOISE_FREE), report)


def _grow(
    task: FitTask, learn: Tensor, measure: Tensor, weight: Tensor | None = None, measure_weight: Tensor | None = None
) -> HistGradientBoostingClassifier:
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
    if weight is None or measure_weight is None:
        return model.fit(_table(task, learn), label[learn].numpy(), **held)
    held["sample_weight_val"] = measure_weight.numpy()
    return model.fit(_table(task, learn), label[learn].numpy(), weight.numpy(), **held)


def _out_of_fold(models: Sequence[HistGradientBoostingClassifier], task: FitTask, folds: Folds, rows: Tensor) -> Tensor:
    """Mean [M] of what the models say that never saw each of the `rows` [M]; each is asked of these alone."""
    unseen = folds.unseen(rows)
    total = torch.zeros(len(rows))
    for member, model in enumerate(models):
        own = unseen[:, member]
        total[own] += _say(model, task, rows[own])
    return total / unseen.sum(1)


def _say(model: HistGradientBoostingClassifier, task: FitTask, rows: Tensor) -> Tensor:
    return torch.from_numpy(model.predict_proba(_table(task, rows))[:, 1]).float()


def _table(task: FitTask, rows: Tensor) -> np.ndarray:
    return cast(FeatureRows, task.inputs).features[rows].float().numpy(force=True)
