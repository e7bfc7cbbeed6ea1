"""Errors of estimated noise rates and coverage of their intervals, on simulated logs whose truth is known.

features x -> utility x.w + noise -> r* = 1 above the median        who likes the answer
quintile of x.v, or of the utility -> P(o = 1), a fifth on average  who gives feedback
r* with label noise -> r -> logistic regression on x, out of fold   the proxy that the estimator gets
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from causalrm_ray.data.simulate import QUINTILES, propensities
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.folds import fold_of
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_rates import estimate_noise_rates
from causalrm_ray.types import FEEDBACK_RATE, NoiseRates

World = Literal["features", "label", "clusters", "ramp", "weak"]
WIDTH, FOLDS, RIDGE = 12, 3, 3.0
ALPHA = 0.5  # of the selection
NOISE = {"features": 0.2, "label": 0.2, "clusters": 0.2, "weak": 1.5}  # standard deviation of the utility beside x.w


@dataclass(frozen=True)
class StudyResult:
    """Both rates in order (rho_01, rho_10): mean, mean absolute and largest absolute error, share of intervals with the truth.

    `warned` is the share of simulations with a warning, `failed` the number that raised an InputError, which nothing else counts.
    """

    bias: tuple[float, ...]
    mean_error: tuple[float, ...]
    max_error: tuple[float, ...]
    coverage: tuple[float, ...]
    width: tuple[float, ...]
    warned: float
    failed: int


def study(world: World, rows: int, rates: NoiseRates, simulations: int, draws: int = 200) -> StudyResult:
    """Estimate the rates of `simulations` logs of `rows` impressions, seeds 0, 1, ..., with `draws` bootstrap draws each.

    Worlds: selection driven by "features" or by the "label"; "clusters", liked and disliked answers far apart; "ramp", a
    quarter of the rows sure at either end and P(r = 1 | x) linear between, ranked by a proxy with an error of 0.05; "weak", where
    x says little and no row is sure: there estimates cannot be right and should warn.
    """
    found, failed = [], 0
    for seed in range(simulations):
        try:
            found.append(estimate_noise_rates(*simulate_feedback(world, rows, rates, seed), draws=draws))
        except InputError:
            failed += 1
    truth = torch.tensor([rates.rho_01, rates.rho_10])
    error = torch.tensor([[one.rates.rho_01, one.rates.rho_10] for one in found]) - truth
    low, high = torch.tensor([[one.rho_01_interval, one.rho_10_interval] for one in found]).unbind(-1)
    return StudyResult(
        bias=tuple(error.mean(0).tolist()),
        mean_error=tuple(error.abs().mean(0).tolist()),
        max_error=tuple(error.abs().amax(0).tolist()),
        coverage=tuple(((low <= truth) & (truth <= high)).float().mean(0).tolist()),
        width=tuple((high - low).mean(0).tolist()),
        warned=sum(bool(one.warnings) for one in found) / len(found),
        failed=failed,
    )


def simulate_feedback(world: World, rows: int, rates: NoiseRates, seed: int) -> tuple[Tensor, Observations]:
    """Out-of-fold proxy of P(r = 1 | x) [N], and the log, of one simulation (see `study`)."""
    generator = torch.Generator().manual_seed(seed)
    if world == "ramp":
        sure = (torch.rand(rows, generator=generator) * 2 - 0.5).clamp(0, 1)
        log = _feedback(torch.rand(rows, generator=generator) < sure, torch.full((rows,), FEEDBACK_RATE), rates, generator)
        proxy = rates.rho_10 + (1 - rates.rho_01 - rates.rho_10) * sure + 0.05 * torch.randn(rows, generator=generator)
        return proxy.clamp(0, 1), log
    w, v = (direction / direction.norm() for direction in torch.randn(2, WIDTH, generator=generator))
    x = torch.randn(rows, WIDTH, generator=generator)
    if world == "clusters":
        x += 2.5 * w * torch.randn(rows, 1, generator=generator).sign()
    utility = x @ w + NOISE[world] * torch.randn(rows, generator=generator)
    driver = utility if world == "label" else x @ v
    quintile = driver.argsort().argsort() * QUINTILES // rows
    log = _feedback(utility > utility.median(), propensities(quintile.double(), ALPHA), rates, generator)
    return _proxy(x, log, seed), log


def _feedback(liked: Tensor, propensity: Tensor, rates: NoiseRates, generator: torch.Generator) -> Observations:
    o = torch.rand(len(liked), generator=generator) < propensity
    flipped = torch.rand(len(liked), generator=generator) < torch.where(liked, rates.rho_01, rates.rho_10)
    return Observations(o.float(), (liked ^ flipped).float())


def _proxy(x: Tensor, log: Observations, seed: int) -> Tensor:
    """P(r = 1 | x) [N] by ridge logistic regression on the rows with feedback, of these by the model not fitted on it."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    seen = (log.o == 1).nonzero()[:, 0]
    fold = fold_of(len(seen), FOLDS, seed)
    probs = torch.empty(FOLDS, len(x), dtype=torch.float64)
    for number in range(FOLDS):
        train = seen[fold != number]
        model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
        model.fit(x[train].numpy(), log.r[train].numpy())
        probs[number] = torch.from_numpy(model.predict_proba(x.numpy())[:, 1])
    proxy = probs.mean(0)
    proxy[seen] = probs[fold, seen]
    return proxy.float()
