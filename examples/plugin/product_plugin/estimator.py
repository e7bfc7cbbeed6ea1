"""An estimator: inverse-propensity weights, truncated at a quantile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import FitTask, Fitted, Need
from causalrm_ray.estimators.core.training import Objective


@dataclass(frozen=True)
class TruncatedIps:
    """Mean over rows with feedback of min(1 / p, q) l(s, r), q the `quantile` of their weights: less variance for some bias."""

    paper: ClassVar[str] = "Ionides 2008, Truncated importance sampling"
    needs: ClassVar[frozenset[Need]] = frozenset({"propensity"})
    quantile: float = 0.9

    def fit(self, task: FitTask) -> Fitted:
        """Fit a scorer of P(r* = 1 | x)."""
        observations, propensity = task.observations, task.nuisances.propensity
        assert propensity is not None, "named in needs"
        weight = 1 / propensity
        weight = weight.clamp(max=float(torch.quantile(weight[observations.o == 1].double(), self.quantile)))

        def objective(rows: Tensor) -> Objective:
            def risk(logit: Tensor, index: Tensor) -> Tensor:
                return weight[index] * task.loss(logit, observations.r[index])

            return Objective(rows[observations.o[rows] == 1], risk)

        scorer = task.scorer()
        return Fitted(scorer, task.minimise(scorer, objective))


TRUNCATED_IPS = TruncatedIps()
