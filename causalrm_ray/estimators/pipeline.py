"""One fit of reward models from a log, as arXiv 2603.18736 has it.

split rows -> proxy of P(r = 1 | x) on O, out of fold -> rho_01, rho_10 -> imputation -> a module per method -> held-out risk
                                                                                                (the serving model's too)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from causalrm_ray.checks import check_both_classes, check_propensity, check_same_length
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.frozen import distil, on_states, with_settings
from causalrm_ray.estimators.core.task import FitTask, Fitted, Nuisances, Observations
from causalrm_ray.estimators.core.training import SINGLE, Epoch, FitReport, FitSettings, Inputs, Objective, Shard, mean_risk
from causalrm_ray.estimators.methods.registry import METHODS
from causalrm_ray.estimators.methods.reweighting import REWEIGHTING, fit_oracle
from causalrm_ray.estimators.nuisances.calibration import cross_calibrate
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate, estimate_noise_rates
from causalrm_ray.estimators.nuisances.propensity import cross_fit_logits, split_rows
from causalrm_ray.losses.noise import denoise
from causalrm_ray.losses.pointwise import LOSSES, Loss, bce
from causalrm_ray.types import NoiseRates

ORACLE = "oracle"
PROXY_FOLDS = 3  # rows without feedback get the mean of as many proxies; two of half the labels each are far weaker
HELD_OUT = 0.2  # share of rows that decide when to stop and whether to promote


@dataclass(frozen=True, eq=False)
class RewardFit:
    """A trained scorer, how its training went, its held-out observed risk, and what else its method found (see Fitted)."""

    module: nn.Module
    report: FitReport
    heldout_risk: float
    figures: Mapping[str, float]
    opinion: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RewardFits:
    """All that one fit makes.

    `fits` by method; `rates` used, and how they were estimated (`noise`, none where they were given, or where the order of the
    rows does not tell them and the first method found its own); `ranking` [N], the out-of-fold P(r = 1 | x), `proxy` [N], the
    same calibrated, and `imputation` [N], the P(r* = 1 | x) that it implies (none where nothing needs them);
    `heldout` row numbers and the risk of the serving model on them (none where none serves).
    """

    fits: dict[str, RewardFit]
    rates: NoiseRates
    noise: NoiseEstimate | None
    ranking: Tensor | None
    proxy: Tensor | None
    imputation: Tensor | None
    heldout: Tensor
    serving_risk: float | None


def fit_reward_models(
    make_module: Callable[[], nn.Module],
    inputs: Inputs,
    observations: Observations,
    propensity: Tensor,
    methods: Sequence[str],
    settings: FitSettings,
    loss: str = "bce",
    rates: NoiseRates | None = None,
    clean_labels: Tensor | None = None,
    serving: nn.Module | None = None,
    heldout: Tensor | None = None,
    states: Tensor | None = None,
    strata: Tensor | None = None,
    caution: float = 0.0,
    shard: Shard = SINGLE,
    seed: int = 0,
    on_epoch: Callable[[str, Epoch], None] | None = None,
) -> RewardFits:
    """Fit one module per name in `methods` on the observed feedback.

    Without methods, only the rates are estimated. `make_module` returns a fresh scorer; `propensity` [N] in (0, 1] is
    calibrated and clipped; `loss` is a key of LOSSES (methods that subtract losses use a bounded "bce"); `rates` skips their
    estimation. "oracle" among the methods is fitted on `clean_labels` [N], which nothing else reads. The rows numbered in
    `heldout` (none: a fifth of all at random) decide when to stop and whether to promote; no module of tokens trains on them,
    and of an ensemble on features every member leaves out a part, by which these rows are judged. `on_epoch(method, epoch)`
    follows the progress.
    `states` [N, D] of a frozen backbone are what proxies, and methods that need them, are fitted on, and what these found is
    distilled into a module; where `inputs` are features, these are the states, and nothing is distilled. `strata` [N] numbers
    from 0 the observed traits that selection may hang on. `caution` is how many of the members' standard deviations a module that
    is distilled from an ensemble stays below their mean. The same seed and shard give the same modules.
    The first method's view of who speaks up is what held-out risks are weighted by, its own and the others'.
    Raises ValueError that names a method, a length, a class or a rate that does not fit.
    """
    _check(inputs, observations, propensity, methods, loss, clean_labels)
    rows = torch.arange(len(inputs))
    if heldout is None:
        _, heldout = split_rows(rows, HELD_OUT, seed)
    train = rows[~torch.isin(rows, heldout)]
    check_both_classes("r of the training rows with feedback", observations.r[train][observations.o[train] == 1])
    check_both_classes("r of the held-out rows with feedback", observations.r[heldout][observations.o[heldout] == 1])
    task = FitTask(
        make_module,
        inputs,
        observations,
        Nuisances(propensity, rates),
        train,
        heldout,
        replace(settings, seed=seed),
        LOSSES[loss],
        shard,
        strata,
    )
    found = _find_nuisances(task, propensity, methods, states)
    fitted = {}
    for name in methods:
        follow = None if on_epoch is None else partial(on_epoch, name)
        given = replace(task, nuisances=found.nuisances, on_epoch=follow)
        fitted[name] = _fit_method(name, given, states, found.proxy, clean_labels, serving, caution)
    return _judge(task, found, fitted, serving)


def _judge(task: FitTask, found: _Found, fitted: Mapping[str, Fitted], serving: nn.Module | None) -> RewardFits:
    """Held-out risks of all that was fitted, and of the serving model."""
    weights = next((one.weights for one in fitted.values()), None)
    rates = found.nuisances.rates
    if rates is None:  # the order of the rows does not tell them: those that the first method found along, then
        rates = NoiseRates(*(next(iter(fitted.values())).figures[name] for name in ("rho_01", "rho_10")))
    nuisances = replace(found.nuisances, rates=rates)
    risk = heldout_objective(task.observations, nuisances, task.loss, task.heldout, weights)
    fits = {
        name: RewardFit(one.scorer, one.report, _gate_risk(one, task, risk), one.figures, one.opinion)
        for name, one in fitted.items()
    }
    serving_risk = None if serving is None else mean_risk(serving, task.inputs, risk, shard=task.shard)
    return RewardFits(fits, rates, found.noise, found.ranking, found.proxy, nuisances.imputation, task.heldout, serving_risk)


@dataclass(frozen=True, eq=False)
class _Found:
    nuisances: Nuisances
    noise: NoiseEstimate | None = None
    ranking: Tensor | None = None
    proxy: Tensor | None = None


def _find_nuisances(task: FitTask, propensity: Tensor, methods: Sequence[str], states: Tensor | None) -> _Found:
    """The nuisances that `methods` need besides those given; no rates where the log tells none and none are required."""
    needs = frozenset[str]().union(*(METHODS[name].needs for name in methods if name != ORACLE))
    given, observations, seed = task.nuisances, task.observations, task.settings.seed
    if given.rates is not None and "imputation" not in needs:
        return _Found(given)
    seen = int(observations.o[task.train].sum())
    ranking = _out_of_fold(task if states is None else with_settings(on_states(task, states), seen))
    proxy = cross_calibrate(ranking, observations.r, observations.o == 1, folds=5, seed=seed, weight=1 / propensity)
    noise, rates = None, given.rates
    if rates is None:
        finds = bool(methods) and methods[0] != ORACLE and "states" in METHODS[methods[0]].needs
        noise = _estimate_rates(ranking, observations, seed, required="rates" in needs or not finds)
        rates = None if noise is None else noise.rates
    imputation = denoise(proxy, rates) if rates is not None and "imputation" in needs else None
    return _Found(replace(given, rates=rates, imputation=imputation), noise, ranking, proxy)


def _fit_method(
    name: str,
    task: FitTask,
    states: Tensor | None,
    proxy: Tensor | None,
    clean: Tensor | None,
    serving: nn.Module | None,
    caution: float,
) -> Fitted:
    if clean is not None and name == ORACLE:
        return fit_oracle(task, clean)
    method = METHODS[name]
    if "rates" not in method.needs:  # a method that takes feedback as true imputes feedback
        task = replace(task, nuisances=replace(task.nuisances, imputation=proxy))
    if "states" not in method.needs:
        return method.fit(task)
    if isinstance(task.inputs, FeatureRows):
        return method.fit(on_states(task, task.inputs.features))
    if states is None:
        raise ValueError(f"{name} is fitted on states [N, D] of a frozen backbone, got none")
    teacher = method.fit(replace(on_states(task, states), spare_heldout=True))
    return distil(task, teacher, states, start=serving, caution=caution)


def _estimate_rates(ranking: Tensor, observations: Observations, seed: int, required: bool) -> NoiseEstimate | None:
    """The rates of the noise; none where the log does not tell them, unless they are required: then InputError."""
    try:
        return estimate_noise_rates(ranking, observations, seed=seed)
    except InputError:
        if required:
            raise
        return None


def _gate_risk(fitted: Fitted, task: FitTask, objective: Objective) -> float:
    """Mean of `objective` over held-out rows, each judged by what did not learn from it."""
    if fitted.opinion is None or not isinstance(task.inputs, FeatureRows):
        return mean_risk(fitted.scorer, task.inputs, objective, shard=task.shard)
    return float(objective.risk(fitted.opinion[objective.rows], objective.rows).double().mean())


def heldout_objective(
    observations: Observations,
    nuisances: Nuisances,
    loss: Loss,
    rows: Tensor,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Objective:
    """The risk that a promotion gate compares, over the rows with feedback among `rows`.

        sum of v_1 l(s, 1) + v_0 l(s, 0)  /  sum of v_1 + v_0

    `weights` (v_1, v_0) [N] are those of a method that found how selection works; with none it is the noise-corrected,
    self-normalised IPS, which is the same with one propensity for both opinions.
    """
    method = REWEIGHTING["causalrm_snips"]
    if weights is None:
        return method.build(observations, nuisances, method.pointwise(loss), rows)
    v1, v0 = weights
    pointwise = method.pointwise(loss)
    seen = rows[observations.o[rows] == 1]
    scale = (v1 + v0)[rows].mean().clamp_min(0.5) * len(rows) / len(seen)  # its mean is 1 where the weights are right

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        one, zero = torch.ones_like(logit), torch.zeros_like(logit)
        return (v1[index] * pointwise(logit, one) + v0[index] * pointwise(logit, zero)) / scale

    return Objective(seen, risk)


def _out_of_fold(task: FitTask) -> Tensor:
    """P(r = 1 | x) [N], of each row by modules that did not train on it; none trained on a held-out row."""
    seen = task.train[task.observations.o[task.train] == 1]
    logit, _ = cross_fit_logits(
        task.make_scorer,
        task.inputs,
        partial(REWEIGHTING["snips"].build, task.observations, task.nuisances, bce),
        seen,
        task.heldout,
        task.settings,
        PROXY_FOLDS,
        task.settings.seed,
        task.shard,
    )
    return torch.sigmoid(logit)


def _check(
    inputs: Inputs,
    observations: Observations,
    propensity: Tensor,
    methods: Sequence[str],
    loss: str,
    clean_labels: Tensor | None,
) -> None:
    for name in methods:
        if name not in METHODS and name != ORACLE:
            raise ValueError(f"method must be one of {[*METHODS, ORACLE]}, got {name!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {list(LOSSES)}, got {loss!r}")
    if (ORACLE in methods) != (clean_labels is not None):
        raise ValueError(f"clean_labels go with the method {ORACLE!r} and with no other, got methods {list(methods)}")
    labels = torch.zeros(len(inputs)) if clean_labels is None else clean_labels
    check_same_length(inputs=torch.empty(len(inputs)), o=observations.o, propensity=propensity, clean_labels=labels)
    check_propensity("propensity", propensity)
