"""CausalRM where feedback depends on the opinion: a propensity for either opinion, and corrections that cannot run away.

    auto's mechanisms, out of fold -> m = P(r*=1 | x), p_k = P(o=1 | x, r*=k), rates -> v_1, v_0 (losses.selection)
    causalrm_ips_stable   sum of v_1 l(s, 1) + v_0 l(s, 0), self-normalised, l squared error (bounded)
    causalrm_dr_stable    squared error of the class-wise doubly robust pseudo-label, beginning at m

Both stop by the same risk on rows that they did not learn from.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from causalrm_ray.estimators.core.frozen import with_settings
from causalrm_ray.estimators.core.members import Folds, cross_fit_members
from causalrm_ray.estimators.core.task import FitTask, Fitted, FunctionMethod, Need
from causalrm_ray.estimators.core.training import Calling, Risk
from causalrm_ray.estimators.methods.mechanisms import among_all, to_logits
from causalrm_ray.estimators.methods.selection import fit_mechanisms
from causalrm_ray.losses.selection import class_weights, class_wise_dr_label
from causalrm_ray.models.scorers.heads import Corrected, EnsembleScorer, to_logit


def weighted_risk(v1: Tensor, v0: Tensor) -> Risk:
    """v_1 (1 - s)^2 + v_0 s^2 over its mean weight, of probabilities s; logits [B, K] in their shape."""
    scale = float((v1 + v0).mean().clamp_min(0.5))

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        prob = torch.sigmoid(logit)
        liked, disliked = v1[index].unsqueeze(1) / scale, v0[index].unsqueeze(1) / scale
        return liked * (1 - prob).square() + disliked * prob.square()

    return risk


def _fit(task: FitTask, doubly_robust: bool) -> Fitted:
    """An ensemble at the early-stopped minimum of the risk; the doubly robust one adds to the mechanisms' out-of-fold logits."""
    found = fit_mechanisms(replace(task, head=task.head or "mlp"))  # one kind throughout
    ensemble = cast(EnsembleScorer, task.scorer(int(doubly_robust)))
    folds = Folds(task, len(ensemble.bias))
    task = with_settings(task, len(folds.learn))
    propensities, start = found.propensities(task.observations), torch.zeros(len(task.inputs))
    weights = class_weights(task.observations.o, task.observations.r, *propensities, found.rates)
    risk = weighted_risk(*weights)
    if doubly_robust:
        m = among_all(found.opinion, found.best.rows, len(task.inputs), 0.5)
        label, start = class_wise_dr_label(m, *weights), to_logit(m)

        def risk(output: Tensor, index: Tensor) -> Tensor:
            return (torch.sigmoid(start[index].unsqueeze(1) + output) - label[index].unsqueeze(1)).square()

    fitted = cross_fit_members(task, Calling(ensemble, "members"), risk, folds, torch.arange(len(start)))
    opinion = folds.out_of_fold(torch.sigmoid(start[fitted.rows].unsqueeze(1) + fitted.output), fitted.rows)
    scorer = Corrected(found.scorer(), ensemble) if doubly_robust else ensemble
    logits = to_logits(opinion, fitted.rows, len(task.inputs))
    return Fitted(scorer, fitted.report, asdict(found.rates), logits, found.rates, propensities)


_PAPER = "arXiv 2603.18736, class-wise, ours"
_STATES: frozenset[Need] = frozenset({"states"})
CLASS_WISE = {
    "causalrm_ips_stable": FunctionMethod(partial(_fit, doubly_robust=False), _PAPER, _STATES),
    "causalrm_dr_stable": FunctionMethod(partial(_fit, doubly_robust=True), _PAPER, _STATES),
}
