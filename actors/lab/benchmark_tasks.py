"""What the benchmark's tasks compute, each on one thread.

run_cell   levels -> log -> propensity (cross-fitted, calibrated) -> rates -> a scorer per method -> metrics on the test split
run_bias   levels -> logs -> every estimator's value for fixed predictions, with the true nuisances, against L_ideal
run_noise  simulated logs -> estimated noise rates and intervals, against the true ones
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causalrm_ray import metrics
from causalrm_ray.config.benchmark import HeadConfig
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.data.embeddings import GradedEmbeddings
from causalrm_ray.data.simulate import SimulatedLog, preferences, rescale, simulate, threshold
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import NOISE_FREE, Observations, load_method
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.nuisances.propensity import calibrate, cross_fit
from causalrm_ray.estimators.pipeline import ORACLE, RewardFits, fit_reward_models
from causalrm_ray.estimators.studies.noise_study import StudyResult, World, study
from causalrm_ray.estimators.studies.semisynthetic import Bias, bias_table
from causalrm_ray.models.scorers.heads import FeatureScorer, centre_and_scale
from causalrm_ray.types import FEEDBACK_RATE, SCENARIOS, NoiseRates, Selection

METRICS = ("r2", "mae", "mse", "auroc", "pearson")
Splits = tuple[GradedEmbeddings, GradedEmbeddings]  # train, test


@dataclass(frozen=True)
class Setting:
    """How a log is simulated: `scenario` numbers a pair of noise rates, or gives the rates.

    `alpha` is None for a selection that it does not matter for; `feedback_rate` is the mean propensity.
    """

    alpha: float | None
    scenario: int | NoiseRates
    selection: Selection
    feedback_rate: float = FEEDBACK_RATE

    @property
    def name(self) -> str:
        """Its name in file names, without the feedback rate, which is one for all of a benchmark."""
        noise = f"scenario-{self.scenario}"
        if isinstance(self.scenario, NoiseRates):
            noise = f"rho-{self.scenario.rho_01!r}-{self.scenario.rho_10!r}"
        strength = "" if self.alpha is None else f"alpha-{self.alpha!r}_"
        return f"{strength}{noise}_{self.selection}"

    @property
    def rates(self) -> NoiseRates:
        """The true noise rates."""
        return self.scenario if isinstance(self.scenario, NoiseRates) else SCENARIOS[self.scenario]

    @property
    def labels(self) -> dict[str, Any]:
        """Its columns in tables: alpha (a number, or ""), scenario (a number, or "rho 0.05/0.1"), selection, rho_01, rho_10."""
        rates, scenario = self.rates, self.scenario
        named = f"rho {rates.rho_01:g}/{rates.rho_10:g}" if isinstance(scenario, NoiseRates) else scenario
        alpha = "" if self.alpha is None else self.alpha
        return {"alpha": alpha, "scenario": named, "selection": self.selection, **asdict(rates)}

    def log(self, data: GradedEmbeddings, seed: int) -> SimulatedLog:
        """A log of the rows of `data`."""
        return simulate(
            data.levels,
            data.features,
            alpha=self.alpha,
            scenario=self.scenario,
            selection=self.selection,
            seed=seed,
            rate=self.feedback_rate,
            prompts=data.prompts,
        )


@dataclass(frozen=True)
class CellSpec:
    """Which methods to fit on a setting's log under a seed, and how; `strata`: are they given the log's."""

    setting: Setting
    seed: int
    methods: tuple[str, ...]
    head: HeadConfig
    strata: bool = False

    @property
    def name(self) -> str:
        """Its name in file names."""
        return f"{self.setting.name}_seed-{self.seed}"


@dataclass(frozen=True)
class MethodResult:
    """Metrics of a method on the clean test split, the noise rates that it used (None if it uses none), and its fit's seconds.

    `fault` says why a method could not be fitted (its rates cannot be estimated, or its risk diverges) or measured.
    """

    method: str
    r2: float | None = None
    mae: float | None = None
    mse: float | None = None
    auroc: float | None = None
    pearson: float | None = None
    rho_01_hat: float | None = None
    rho_10_hat: float | None = None
    fit_s: float | None = None
    fault: str | None = None


def run_cell(spec: CellSpec, data: Splits) -> list[MethodResult]:
    """The result of each of the spec's methods, fitted on a log of the train split and measured on the test split."""
    torch.set_num_threads(1)  # cells run side by side, one to a core
    head, (train, test) = spec.head, data
    centre, scale = centre_and_scale(train.features)  # one scale, so that directions keep their relative weight
    features, test_features = ((split.features.float() - centre) / scale for split in (train, test))
    log = spec.setting.log(train, spec.seed)
    inputs, observations = FeatureRows(features), Observations(log.o, log.r)
    make_scorer = partial(FeatureScorer, features.shape[1], head.widths, head.dropout)
    settings = FitSettings(head.epochs, head.lr, head.batch_size, head.patience, head.weight_decay, spec.seed, head.bf16)
    raw, _ = cross_fit(make_scorer, inputs, log.o, settings)
    propensity = calibrate(raw, log.o, head.clip, seed=spec.seed).prob
    strata = log.strata if spec.strata else None
    given = {"settings": settings, "strata": strata, "head": head.kind}
    fit = partial(fit_reward_models, make_scorer, inputs, observations, propensity, **given)
    rates, fault = None, None
    try:
        rates = fit(methods=()).rates
    except InputError as error:
        fault = str(error)
    truth = preferences(test.levels, threshold(train.levels))
    measure = partial(_fit_method, fit, log.preference, FeatureRows(test_features), truth)
    results = []
    for method in spec.methods:
        needs = frozenset[str]() if method == ORACLE else load_method(method).needs
        if "rates" in needs:
            results.append(MethodResult(method, fault=fault) if rates is None else measure(method, rates))
        else:
            results.append(measure(method, None if "states" in needs else NOISE_FREE))  # on states, methods find their own
    return results


def run_bias(setting: Setting, train_and_draws: tuple[GradedEmbeddings, int]) -> list[Bias]:
    """Biases of the estimators with the true propensity, rates and preferences, on that many logs of the train split.

    The propensity given what selects is the same under every seed, so that of the first log is everyone's.
    """
    torch.set_num_threads(1)
    train, draws = train_and_draws
    logs = [setting.log(train, seed) for seed in range(draws)]
    truth, observations = logs[0], [Observations(log.o, log.r) for log in logs]
    return bias_table(rescale(train.levels), truth.preference, truth.propensity, truth.rates, observations)


@dataclass(frozen=True)
class NoiseSpec:
    """A world of the noise study, the impressions of a log, and the true noise rates."""

    world: World
    rows: int
    rates: NoiseRates

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.world}_{self.rows}_{self.rates.rho_01!r}_{self.rates.rho_10!r}"


def run_noise(spec: NoiseSpec, repetitions: tuple[int, int]) -> StudyResult:
    """The study of a spec; `repetitions` are its simulations and the bootstrap draws of each."""
    torch.set_num_threads(1)
    return study(spec.world, spec.rows, spec.rates, *repetitions)


def _fit_method(
    fit: Callable[..., RewardFits], preference: Tensor, test: FeatureRows, truth: Tensor, method: str, rates: NoiseRates | None
) -> MethodResult:
    began = time.perf_counter()
    clean = preference if method == ORACLE else None
    try:
        fitted = fit(methods=(method,), rates=rates, clean_labels=clean).fits[method]
    except (InputError, FloatingPointError) as error:
        return MethodResult(method, fault=str(error))
    seconds = time.perf_counter() - began
    used = {} if rates is None or rates is NOISE_FREE else asdict(rates)
    used |= {name: value for name, value in fitted.figures.items() if name in ("rho_01", "rho_10")}
    known = MethodResult(method, rho_01_hat=used.get("rho_01"), rho_10_hat=used.get("rho_10"), fit_s=seconds)
    prob = torch.sigmoid(predict(fitted.scorer, test))
    try:
        return replace(known, **{name: getattr(metrics, name)(prob, truth) for name in METRICS})
    except ValueError as error:  # constant predictions have no correlation
        return replace(known, fault=str(error))
