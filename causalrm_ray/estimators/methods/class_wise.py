"""CausalRM where feedback depends on the opinion: a propensity for either opinion, and corrections that cannot run away.

    auto's mechanisms, out of fold -> m = P(r*=1 | x), p_k = P(o=1 | x, r*=k), rates -> v_1, v_0 (losses.selection)
    causalrm_ips_stable   sum of v_1 l(s, 1) + v_0 l(s, 0), self-normalised, l squared error (bounded)
    causalrm_dr_stable    squared error of the class-wise doubly robust pseudo-label, beginning at m

Both stop by the same risk on rows that they did not learn from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from causalrm_ray.estimators.core.frozen import with_settings
from causalrm_ray.estimators.core.members import Folds, Members, cross_fit_members
from causalrm_ray.estimators.core.task import FitTask, Fitted, Need
from causalrm_ray.estimators.core.training import Risk
from causalrm_ray.estimators.methods.mechanisms import spread, to_logits
from causalrm_ray.estimators.methods.selection import Averaged, fit_mechanisms
from causalrm_ray.losses.selection import class_wise_dr_label
from causalrm_ray.models.heads import Corrected, EnsembleScorer, to_logit


@dataclass(frozen=True)
class ClassWiseMethod:
    """A stable variant of CausalRM; `doubly_robust` or by weights alone."""

    doubly_robust: bool
    paper: str = "arXiv 2603.18736, class-wise, ours"
    needs: frozenset[Need] = frozenset({"states"})

    def fit(self, task: FitTask) -> Fitted:
        """A scorer at the early-stopped minimum of the risk."""
        found = fit_mechanisms(replace(task, on_epoch=None))
        if self.doubly_robust:
            return _fit_residual(task, found)
        return _fit_weighted(task, found)


def weighted_risk(v1: Tensor, v0: Tensor) -> Risk:
    """v_1 (1 - s)^2 + v_0 s^2 over its mean weight, of probabilities s; logits [B, K] in their shape."""
    scale = float((v1 + v0).mean().clamp_min(0.5))

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        prob = torch.sigmoid(logit)
        liked, disliked = v1[index].unsqueeze(1) / scale, v0[index].unsqueeze(1) / scale
        return liked * (1 - prob).square() + disliked * prob.square()

    return risk


def _fit_weighted(task: FitTask, found: Averaged) -> Fitted:
    scorer = cast(EnsembleScorer, task.scorer())
    folds = Folds(task, len(scorer.bias))
    task = with_settings(task, len(folds.learn))
    everyone = torch.arange(len(task.inputs))
    weights = found.class_weights(task.observations)
    fitted = cross_fit_members(task, Members(scorer), weighted_risk(*weights), folds, everyone)
    opinion = folds.out_of_fold(torch.sigmoid(fitted.output), fitted.rows)
    return Fitted(scorer, fitted.report, _rates(found), to_logits(opinion, fitted.rows, len(task.inputs)), weights)


def _fit_residual(task: FitTask, found: Averaged) -> Fitted:
    """What an ensemble adds to the mechanisms' logits: learned on their out-of-fold ones."""
    residual = cast(EnsembleScorer, task.scorer(1))
    folds = Folds(task, len(residual.bias))
    task = with_settings(task, len(folds.learn))
    weights = found.class_weights(task.observations)
    m = spread(found.opinion, found.rows, len(task.inputs), 0.5)
    label, start = class_wise_dr_label(m, *weights), to_logit(m)

    def risk(output: Tensor, index: Tensor) -> Tensor:
        return (torch.sigmoid(start[index].unsqueeze(1) + output) - label[index].unsqueeze(1)).square()

    fitted = cross_fit_members(task, Members(residual), risk, folds, torch.arange(len(start)))
    opinion = folds.out_of_fold(torch.sigmoid(start[fitted.rows].unsqueeze(1) + fitted.output), fitted.rows)
    corrected = Corrected(found.scorer(), residual)
    return Fitted(corrected, fitted.report, _rates(found), to_logits(opinion, fitted.rows, len(task.inputs)), weights)


def _rates(found: Averaged) -> dict[str, float]:
    return {"rho_01": found.rates.rho_01, "rho_10": found.rates.rho_10}


CLASS_WISE: dict[str, ClassWiseMethod] = {
    "causalrm_ips_stable": ClassWiseMethod(doubly_robust=False),
    "causalrm_dr_stable": ClassWiseMethod(doubly_robust=True),
}
