"""The posterior of a few parameters of binned outcomes, as a Gaussian around its mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrm_ray.estimators.core.scoring import maximise

LEAST = 1e-12  # probability


@dataclass(frozen=True, eq=False)
class Gaussian:
    """`mean` [P] and `covariance` [P, P] of parameters, float64."""

    mean: Tensor
    covariance: Tensor

    def of(self, quantities: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`quantities` [Q] at the mean, and their covariance [Q, Q] by the delta method."""
        slopes = torch.func.jacfwd(quantities)(self.mean)
        return quantities(self.mean), slopes @ self.covariance @ slopes.T


def laplace(
    probabilities: Callable[[Tensor], Tensor], counts: Tensor, prior: Gaussian, start: Tensor, dispersion: float
) -> Gaussian:
    """The posterior of parameters [P] of multinomial `counts` [..., K] with `probabilities`(parameters) [..., K].

    Its covariance is the inverse of Fisher's information, counts over `dispersion` >= 1, plus the prior's precision; the mode is
    found by scoring from `start` [P]. Raises FloatingPointError for one that is not finite.
    """
    precision, rows = torch.linalg.inv(prior.covariance), counts.sum(-1, keepdim=True)

    def density(at: Tensor) -> float:
        from_prior = at - prior.mean
        likelihood = (counts * probabilities(at).clamp_min(LEAST).log()).sum() / dispersion
        return float(likelihood - from_prior @ precision @ from_prior / 2)

    def curvature(at: Tensor) -> tuple[Tensor, Tensor]:  # gradient [P], information [P, P]
        p = probabilities(at).clamp_min(LEAST)
        slopes = torch.func.jacfwd(probabilities)(at)
        gradient = (slopes * (counts / p)[..., None]).flatten(0, -2).sum(0) / dispersion - precision @ (at - prior.mean)
        weighed = (slopes * (rows / p).sqrt()[..., None]).flatten(0, -2)
        return gradient, weighed.T @ weighed / dispersion + precision

    at = maximise(density, curvature, start)
    covariance = torch.linalg.inv(curvature(at)[1])
    if not bool(at.isfinite().all() and covariance.isfinite().all()):
        raise FloatingPointError(f"a posterior must be finite, got the mode {at.tolist()}")
    return Gaussian(at, covariance)
