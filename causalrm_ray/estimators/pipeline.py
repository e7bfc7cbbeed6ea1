"""One fit of reward models from a log, as in arXiv 2603.18736.

split rows -> proxy of P(r = 1 | x) on O, out of fold -> rho_01, rho_10 -> imputation -> a module per method -> held-out risk
                                                                 its level, by judged rows --+
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast, get_args

import torch
from torch import Tensor, nn

from causalrm_ray.checks import check_both_classes, check_propensity, check_same_length
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.frozen import on_states, with_settings
from causalrm_ray.estimators.core.task import FitTask, Fitted, Method, Nuisances, Observations, Propensities, load_method
from causalrm_ray.estimators.core.training import SINGLE, FitSettings, Inputs, Objective, Shard, mean_risk
from causalrm_ray.estimators.levelling import check_judged, levelled
from causalrm_ray.estimators.methods.reweighting import BOOSTED, REWEIGHTING, fit_oracle
from causalrm_ray.estimators.nuisances.calibration import cross_calibrate
from causalrm_ray.estimators.nuisances.level import LevelReport
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate, estimate_by_anchors, estimate_noise_rates
from causalrm_ray.estimators.nuisances.propensity import cross_fit_logits, split_rows
from causalrm_ray.losses.pointwise import LOSSES, Loss, bce
from causalrm_ray.losses.selection import class_weights
from causalrm_ray.losses.surrogate import denoise
from causalrm_ray.types import HeadKind, NoiseEstimator, NoiseRates

ORACLE = "oracle"
PROXY_FOLDS = 3  # rows without feedback get the mean of as many proxies; two of half the labels each are far weaker
HELD_OUT = 0.2  # share of rows that decide when to stop and whether to promote


@dataclass(frozen=True, eq=False)
class RewardFits:
    """All that one fit makes.

    `fits` by method, and each one's held-out observed risk (`risks`); the `rates` used, `known` or the first method's own where
    it finds them, and how they were estimated otherwise (`noise`); `selection`, P(o = 1 | x, r* = k) [N], k = 1, 0, by the first
    method (None: it takes P(o = 1 | x) for both); `ranking` [N], the
    out-of-fold P(r = 1 | x), `proxy` [N], the same calibrated, and `imputation` [N], the P(r* = 1 | x) that it implies (None
    where nothing needs them); `heldout` row numbers; what judged rows said of each method's level (`level`, empty where none
    was).
    """

    fits: dict[str, Fitted]
    risks: dict[str, float]
    rates: NoiseRates
    noise: NoiseEstimate | None
    selection: Propensities | None
    ranking: Tensor | None
    proxy: Tensor | None
    imputation: Tensor | None
    heldout: Tensor
    level: Mapping[str, LevelReport] = field(default_factory=dict)
    known: bool = False


def fit_reward_models(
    make_module: Callable[[], nn.Module],
    inputs: Inputs,
    observations: Observations,
    propensity: Tensor,
    methods: Sequence[str],
    settings: FitSettings,
    loss: str = "bce",
    rates: NoiseRates | None = None,
    noise_rates: NoiseEstimator = "curve",
    clean_labels: Tensor | None = None,
    judged: Tensor | None = None,
    heldout: Tensor | None = None,
    strata: Tensor | None = None,
    ranked: bool = False,
    head: HeadKind | None = "mlp",
    states: bool = False,
    shard: Shard = SINGLE,
) -> RewardFits:
    """Fit one module per name in `methods` on the observed feedback.

    `methods` are names or import paths of estimators (registry.ESTIMATORS); without any, only the rates are estimated.
    `make_module` returns a fresh scorer; `propensity` [N] in (0, 1] is calibrated and clipped; `loss` is a key of LOSSES (methods
    that subtract losses use a bounded "bce"); `rates` are known, or estimated as `noise_rates` says: by the labels' "curve" along
    a proxy's ranks, or by the paper's "anchors". "oracle" among the methods is fitted on `clean_labels` [N], which nothing else
    reads. `judged` [N] is r* of a small sample of rows that was drawn at random and judged with care, nan elsewhere: it sets the
    level of every method's scorer but the oracle's (see estimators.levelling), and nothing else reads it; feedback on these rows
    counts as that on others does. The rows numbered in `heldout` (by default a fifth of all at random, or of the clusters) decide
    when to stop and whether to promote; each member of an ensemble leaves out a part of all rows, by which these rows are judged.
    `strata` [N] numbers from 0 the observed traits that selection may depend on. `ranked` asks for `ranking` where no method
    needs it, unless rates are given. `head` is the kind of model where `inputs` are features: boosting (trees) is for the methods
    BOOSTED; None lets `two_stage` and `auto` choose between mlp and boosting by held-out feedback. `states` says that `inputs`
    are states of a backbone: proxies are then ensembles of small heads, and no member of any ensemble trains on a held-out row,
    so that what is fitted next on other rows can be compared with it there.
    The same settings and shard give the same modules.
    All held-out risks are weighted by the first method's selection model.
    Raises ValueError that names a method, a length, a class or a rate that does not fit.
    """
    loaded = {name: load_method(name) for name in methods if name != ORACLE}
    check_head(head, [*loaded])
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {list(LOSSES)}, got {loss!r}")
    if noise_rates not in get_args(NoiseEstimator):
        raise ValueError(f"noise_rates must be one of {', '.join(get_args(NoiseEstimator))}, got {noise_rates!r}")
    if (ORACLE in methods) != (clean_labels is not None):
        raise ValueError(f"clean_labels go with the method {ORACLE!r} and with no other, got methods {list(methods)}")
    labels = torch.zeros(len(inputs)) if clean_labels is None else clean_labels
    check_same_length(inputs=torch.empty(len(inputs)), o=observations.o, propensity=propensity, clean_labels=labels)
    check_propensity("propensity", propensity)
    if judged is not None:
        check_judged(judged, len(inputs))
    rows = torch.arange(len(inputs))
    if heldout is None:
        _, heldout = split_rows(rows, HELD_OUT, settings.seed, observations.cluster)
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
        settings,
        LOSSES[loss],
        shard,
        strata,
        spare_heldout=states,
        head=head,
    )
    needs = frozenset[str]().union(*(method.needs for method in loaded.values()))
    first_finds_rates = bool(methods) and methods[0] != ORACLE and "states" in loaded[methods[0]].needs
    estimate = "rates" in needs or not first_finds_rates
    impute = "imputation" in needs
    if (rates is None and (estimate or ranked)) or impute:
        found = _find_nuisances(task, propensity, impute, estimate, noise_rates, states)
    else:
        found = _Found(task.nuisances)
    fitted: dict[str, Fitted] = {}
    level: dict[str, LevelReport] = {}
    for name in methods:
        given = replace(task, nuisances=found.nuisances)
        if name in loaded:
            fitted[name], report = _fit_method(name, loaded[name], given, rates, found.proxy, judged)
            level |= {name: report} if report else {}
        elif clean_labels is not None:
            fitted[name] = fit_oracle(given, clean_labels)
    return replace(_risks(task, found, fitted), level=level, known=rates is not None)


def check_head(head: HeadKind | None, methods: Sequence[str]) -> None:
    """Raise ValueError for the first of `methods` that a `head` of this kind cannot fit."""
    others = [name for name in methods if name not in (*BOOSTED, ORACLE)]
    if head == "boosting" and others:
        raise ValueError(f"kind boosting fits {', '.join(BOOSTED)}, got method {others[0]!r}: use kind mlp or linear for it")


def _risks(task: FitTask, found: _Found, fitted: dict[str, Fitted]) -> RewardFits:
    """Held-out risks of all that was fitted."""
    first = next(iter(fitted.values()), None)
    rates = found.nuisances.rates if first is None or first.rates is None else first.rates
    if rates is None:
        raise ValueError(f"{next(iter(fitted))} needs states and no rates: it must find its own (Fitted.rates), got None")
    selection = None if first is None else first.propensities
    nuisances = replace(found.nuisances, rates=rates)
    risk = heldout_objective(task.observations, nuisances, task.loss, task.heldout, selection)
    risks = {name: _gate_risk(one, task, risk) for name, one in fitted.items()}
    noise = found.noise if rates is found.nuisances.rates else None
    return RewardFits(fitted, risks, rates, noise, selection, found.ranking, found.proxy, nuisances.imputation, task.heldout)


@dataclass(frozen=True, eq=False)
class _Found:
    nuisances: Nuisances
    noise: NoiseEstimate | None = None
    ranking: Tensor | None = None
    proxy: Tensor | None = None


def _find_nuisances(
    task: FitTask, propensity: Tensor, impute: bool, estimate: bool, noise_rates: NoiseEstimator, states: bool
) -> _Found:
    """The nuisances not given; rates only where they are to be estimated: InputError if the log does not identify them."""
    given, observations, seed = task.nuisances, task.observations, task.settings.seed
    labels = int(observations.o[task.train].sum())
    ranking = _out_of_fold(with_settings(on_states(task, cast(FeatureRows, task.inputs).features), labels) if states else task)
    seen = observations.o == 1
    proxy = cross_calibrate(ranking, observations.r, seen, 5, seed, 1 / propensity, observations.cluster)
    noise, rates = None, given.rates
    if rates is None and estimate:
        curve = noise_rates == "curve"
        noise = estimate_noise_rates(ranking, observations, seed=seed) if curve else estimate_by_anchors(proxy, observations)
        rates = noise.rates
    imputation = denoise(proxy, rates) if rates is not None and impute else None
    return _Found(replace(given, rates=rates, imputation=imputation), noise, ranking, proxy)


def _fit_method(
    name: str, method: Method, task: FitTask, known: NoiseRates | None, proxy: Tensor | None, judged: Tensor | None
) -> tuple[Fitted, LevelReport | None]:
    if "rates" not in method.needs:  # what takes feedback as true imputes feedback; what finds rates itself takes known ones
        task = replace(task, nuisances=replace(task.nuisances, imputation=proxy, rates=known))
    if "states" in method.needs:
        if not isinstance(task.inputs, FeatureRows):
            raise ValueError(f"{name} is fitted on features, such as states of a frozen backbone, got tokens")
        task = on_states(task, task.inputs.features)
    fitted = method.fit(task)
    return (fitted, None) if judged is None else levelled(fitted, judged, task)


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
    selection: Propensities | None = None,
) -> Objective:
    """The risk that a promotion gate compares, over the rows with feedback among `rows`.

        sum of v_1 l(s, 1) + v_0 l(s, 0)  /  sum of v_1 + v_0

    (v_1, v_0) [N] are losses.selection.class_weights by the nuisances' rates, of a method that modelled `selection`, P(o = 1 | x,
    r* = k); without it, it is the noise-corrected, self-normalised IPS, which is the same with one propensity for both opinions.
    """
    method = REWEIGHTING["causalrm_snips"]
    if selection is None or nuisances.rates is None:
        return method.build(observations, nuisances, method.pointwise(loss), rows)
    v1, v0 = class_weights(observations.o, observations.r, *selection, nuisances.rates)
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
    objective = partial(REWEIGHTING["snips"].build, task.observations, task.nuisances, bce)
    logit, _ = cross_fit_logits(task, objective, seen, PROXY_FOLDS)
    return torch.sigmoid(logit)
