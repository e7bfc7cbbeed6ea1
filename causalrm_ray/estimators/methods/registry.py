"""Every estimator by name."""

from __future__ import annotations

from typing import Protocol

from causalrm_ray.estimators.core.task import FitTask, Fitted, Need
from causalrm_ray.estimators.methods.class_wise import CLASS_WISE
from causalrm_ray.estimators.methods.denoising import DENOISING
from causalrm_ray.estimators.methods.multitask import MULTITASK
from causalrm_ray.estimators.methods.reweighting import REWEIGHTING
from causalrm_ray.estimators.methods.selection import SELECTION


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

    def fit(self, task: FitTask, /) -> Fitted:
        """Fit a scorer of P(r* = 1 | x)."""
        ...


METHODS: dict[str, Method] = {**REWEIGHTING, **MULTITASK, **DENOISING, **SELECTION, **CLASS_WISE}
