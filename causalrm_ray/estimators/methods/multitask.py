"""Methods that learn what they need beside the reward, in one fit and on one trunk.

    scorer + further heads --one risk over all rows--> the scorer alone

They take feedback as true and read no nuisance: what a propensity or an imputation they use, they learn. All stop by the plain
loss on held-out rows with feedback: a sum of tasks would stop by whichever is worst, and a learned propensity would judge itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import FitTask, Fitted, FunctionMethod, Need, Observations
from causalrm_ray.estimators.core.training import Objective
from causalrm_ray.estimators.methods.observed import minimise
from causalrm_ray.estimators.nuisances.propensity import lowest_weighted
from causalrm_ray.losses import multitask, reweighted
from causalrm_ray.losses.pointwise import Loss, bce, bounded_bce
from causalrm_ray.models.scorers.heads import WithHeads

MIN_SHARE = 0.01  # the propensity starts at least this far from 0 and 1
PENALTY = 1.0  # of the squared constraint of stable DR
ALPHA, GAMMA = 0.1, 0.01  # of CVIB's contrast and confidence penalty

Risk = Callable[..., Tensor]  # (loss, the scorer's logit [B], that of each further head, o [B], r [B]) -> per-row risk [B]


@dataclass(frozen=True)
class MultiTask:
    """A method whose risk is of a scorer and `heads` further heads, the first a propensity's, the second an imputation's.

    Learned propensities are clipped in weights at `lowest_weighted`.

    `subtracts`: the risk subtracts losses, and takes a bounded one in place of `bce`.
    """

    risk: Risk
    heads: int
    paper: str
    subtracts: bool = False
    needs: frozenset[Need] = frozenset()

    def fit(self, task: FitTask) -> Fitted:
        """A scorer at the minimum of the risk. The propensity starts at the share of training rows with feedback."""
        module = WithHeads(task.scorer(), self.heads)
        with torch.no_grad():
            module.heads.bias[0] = torch.logit(task.observations.o[task.train].mean(), eps=MIN_SHARE)
        train = self.objective(task.observations, self.pointwise(task.loss), task.train)
        return Fitted(module.scorer, minimise(task, module, train))

    def pointwise(self, loss: Loss) -> Loss:
        """`loss`, or `bounded_bce` for `bce` where losses are subtracted, and the risk would otherwise have no floor."""
        return bounded_bce if self.subtracts and loss is bce else loss

    def objective(self, observations: Observations, loss: Loss, rows: Tensor) -> Objective:
        """The risk over `rows` of outputs [B, 1 + heads]. Raises ValueError where none of the rows has feedback."""
        if not bool(observations.o[rows].any()):
            raise ValueError(f"o must hold at least one row with feedback, got none in {len(rows)} rows")

        floor = lowest_weighted(None, observations.o)

        def risk(outputs: Tensor, index: Tensor) -> Tensor:
            return self.risk(loss, *outputs.unbind(1), observations.o[index], observations.r[index], floor=floor)

        return Objective(rows, risk)


def fit_cvib(task: FitTask) -> Fitted:
    """A scorer at the minimum of the counterfactual variational information bottleneck."""
    scorer = task.scorer()
    return Fitted(scorer, minimise(task, scorer, cvib_objective(task.observations, task.loss, task.train)))


def cvib_objective(observations: Observations, loss: Loss, rows: Tensor) -> Objective:
    """The risk over `rows` of logits [B]. Raises ValueError where none of the rows has feedback."""
    weight = torch.zeros(len(observations))
    weight[rows] = reweighted.naive_weights(observations.o[rows])

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        return multitask.cvib(loss, logit, observations.o[index], observations.r[index], weight[index], ALPHA, GAMMA)

    return Objective(rows, risk)


_ZHANG = "Zhang et al. 2020, arXiv 1910.09337"
MULTITASK: dict[str, MultiTask | FunctionMethod] = {
    "mt_ips": MultiTask(multitask.mt_ips, 1, _ZHANG),
    "mt_dr": MultiTask(multitask.mt_dr, 2, _ZHANG, subtracts=True),
    "sdr": MultiTask(partial(multitask.sdr, penalty=PENALTY), 2, "Li et al. 2022, arXiv 2205.04701"),
    "cvib": FunctionMethod(fit_cvib, "Wang et al. 2020, arXiv 2009.02623"),
}
