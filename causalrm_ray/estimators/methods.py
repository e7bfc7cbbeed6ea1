"""Every estimator by name."""

from __future__ import annotations

from typing import Protocol

from causalrm_ray.estimators.class_wise import CLASS_WISE
from causalrm_ray.estimators.denoising import DENOISING
from causalrm_ray.estimators.multitask import MULTITASK
from causalrm_ray.estimators.problem import Fitted, Need, Problem
from causalrm_ray.estimators.reweighting import REWEIGHTING
from causalrm_ray.estimators.selection import SELECTION


class Method(Protocol):
    """An estimator: `paper` is its source, `needs` names the nuisances that it reads."""

    @property
    def paper(self) -> str:
        """Where the method comes from."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """The nuisances that a fit reads; all others it must not."""
        ...

    def fit(self, problem: Problem, /) -> Fitted:
        """Fit a scorer of P(r* = 1 | x)."""
        ...


METHODS: dict[str, Method] = {**REWEIGHTING, **MULTITASK, **DENOISING, **SELECTION, **CLASS_WISE}
