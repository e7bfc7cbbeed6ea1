"""Methods that are one risk over rows: losses weighted by who gave feedback, on labels taken as they are or noise-corrected.

    REWEIGHTING["causalrm_dr"].build(observations, nuisances, loss, rows) -> Objective

Formulas live in losses; here they are only joined: causalrm_dr = dr o surrogate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrm_ray.checks import check_binary, check_same_length
from causalrm_ray.estimators.core.boosting import fit_weighted
from causalrm_ray.estimators.core.task import NOISE_FREE, FitTask, Fitted, Need, Nuisances, Observations
from causalrm_ray.estimators.core.training import Objective
from causalrm_ray.losses import reweighted
from causalrm_ray.losses.label_noise import forward_logit
from causalrm_ray.losses.pointwise import LINEAR, Loss, bce, bounded_bce
from causalrm_ray.losses.sensitivity import corrected_label
from causalrm_ray.losses.surrogate import surrogate
from causalrm_ray.types import NoiseRates

# (observations, propensity [N], rates, imputation [N], loss, rows [M]) -> the risk over these rows
Join = Callable[[Observations, Tensor, NoiseRates, Tensor, Loss, Tensor], Objective]


@dataclass(frozen=True)
class Reweighting:
    """A method that is one risk over rows: `join` joins it; `subtracts` where it subtracts losses."""

    join: Join
    paper: str
    needs: frozenset[Need] = frozenset()
    subtracts: bool = False

    def pointwise(self, loss: Loss) -> Loss:
        """`loss`, or `bounded_bce` for `bce` where losses are subtracted, and the risk would otherwise have no floor."""
        return bounded_bce if self.subtracts and loss is bce else loss

    def build(self, observations: Observations, nuisances: Nuisances, loss: Loss, rows: Tensor) -> Objective:
        """The risk over `rows` from the needed nuisances, and neutral ones in place of what the method must not read."""
        given = {name: getattr(nuisances, name) for name in sorted(self.needs)}
        for name, value in given.items():
            if value is None:
                raise ValueError(f"this method needs {list(given)}, got no {name}")
        propensity = given.get("propensity", observations.o[rows].mean().expand(len(observations)))  # equally likely everywhere
        imputation = given.get("imputation", torch.ones(len(observations)))
        check_same_length(o=observations.o, propensity=propensity, imputation=imputation)
        return self.join(observations, propensity, given.get("rates", NOISE_FREE), imputation, loss, rows)

    def fit(self, task: FitTask) -> Fitted:
        """A scorer at the minimum of the risk."""
        objective = partial(self.build, task.observations, task.nuisances, self.pointwise(task.loss))
        if task.head == "boosting":
            if self.subtracts:
                raise ValueError(f"trees fit {', '.join(BOOSTED)} only: this method subtracts losses")
            return fit_weighted(task, objective(task.train), objective(task.heldout))
        scorer = task.scorer()
        return Fitted(scorer, task.minimise(scorer, objective))


def _weighted(weights: Callable[[Tensor, Tensor], Tensor], paper: str, *needs: Need) -> Reweighting:
    """Risk w_i l_i. Rows without feedback weigh nothing and are left out, the mean being kept."""

    def join(
        observations: Observations, propensity: Tensor, rates: NoiseRates, imputation: Tensor, loss: Loss, rows: Tensor
    ) -> Objective:
        weight = torch.zeros(len(observations), dtype=propensity.dtype)
        weight[rows] = weights(observations.o[rows], propensity[rows])
        seen = rows[observations.o[rows] == 1]
        weight *= len(seen) / len(rows)

        def risk(logit: Tensor, index: Tensor) -> Tensor:
            return weight[index] * surrogate(loss, logit, observations.r[index], rates)

        return Objective(seen, risk)

    return Reweighting(join, paper, frozenset(needs), subtracts="rates" in needs)


def _doubly_robust(
    observations: Observations, propensity: Tensor, rates: NoiseRates, imputation: Tensor, loss: Loss, rows: Tensor
) -> Objective:
    if loss in LINEAR:  # sums of losses are then the loss of the same sum of labels: one loss a step instead of three
        corrected = corrected_label(observations.r[rows], rates)
        label = imputation.to(torch.float64, copy=True)
        label[rows] = reweighted.dr(corrected, observations.o[rows].double(), propensity[rows].double(), label[rows])
        return Objective(rows, lambda logit, index: LINEAR[loss](logit, label[index]))

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        observed = surrogate(loss, logit, observations.r[index], rates)
        return reweighted.dr(observed, observations.o[index], propensity[index], loss(logit, imputation[index]))

    return Objective(rows, risk)


def _forward_correction(
    observations: Observations, propensity: Tensor, rates: NoiseRates, imputation: Tensor, loss: Loss, rows: Tensor
) -> Objective:
    """The loss of the prediction passed through the noise, a proper score of noisy labels, over the rows with feedback."""
    seen = rows[observations.o[rows] == 1]
    return Objective(seen, lambda logit, index: loss(forward_logit(logit, rates), observations.r[index]))


def _doubly_robust_method(paper: str, *needs: Need) -> Reweighting:
    return Reweighting(_doubly_robust, paper, frozenset(needs), subtracts=True)


_CAUSALRM = "Wang et al. 2026, arXiv 2603.18736"
REWEIGHTING: dict[str, Reweighting] = {
    "naive": _weighted(lambda o, _: reweighted.naive_weights(o), "-"),
    "ips": _weighted(reweighted.ips_weights, "Schnabel et al. 2016, arXiv 1602.05352", "propensity"),
    "snips": _weighted(reweighted.snips_weights, "Swaminathan and Joachims 2015", "propensity"),
    "dr": _doubly_robust_method("Wang et al. 2019, ICML", "propensity", "imputation"),
    "causalrm_ips": _weighted(reweighted.ips_weights, _CAUSALRM, "propensity", "rates"),
    "causalrm_snips": _weighted(reweighted.snips_weights, _CAUSALRM + ", self-normalised", "propensity", "rates"),
    "causalrm_dr": _doubly_robust_method(_CAUSALRM, "propensity", "rates", "imputation"),
    "causalrm_ips_surrogate": _weighted(lambda o, _: reweighted.naive_weights(o), _CAUSALRM + ", no propensity", "rates"),
    "causalrm_dr_surrogate": _doubly_robust_method(_CAUSALRM + ", no propensity", "rates", "imputation"),
}
FORWARD_CORRECTION = Reweighting(_forward_correction, "Patrini et al. 2017, arXiv 1609.03683", frozenset({"rates"}))
BOOSTED = ("naive", "ips", "snips", "two_stage", "auto")  # methods that trees can fit: others subtract losses, or share states
# full method -> (only its reweighting: the paper's dagger, only its surrogate: the paper's double dagger)
ABLATIONS = {"causalrm_ips": ("ips", "causalrm_ips_surrogate"), "causalrm_dr": ("dr", "causalrm_dr_surrogate")}


def oracle_objective(clean: Tensor, loss: Loss, rows: Tensor) -> Objective:
    """The ideal risk, on true labels `clean` [N] in {0, 1}; for reports only, and the only reader of such a column.

    L_ideal = mean over D of l(r^(x_i), r*_i)
    """
    check_binary("clean", clean)
    return Objective(rows, lambda logit, index: loss(logit, clean[index].to(logit.dtype)))


def fit_oracle(task: FitTask, clean: Tensor) -> Fitted:
    """A scorer at the minimum of the ideal risk; for reports only."""
    scorer = task.scorer()
    return Fitted(scorer, task.minimise(scorer, partial(oracle_objective, clean, task.loss)))
