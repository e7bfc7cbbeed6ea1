"""What the benchmark's tasks compute, each on one thread.

run_cell   levels -> log -> propensity (cross-fitted, calibrated) -> rates -> a scorer per method -> metrics on the test split
run_bias   levels -> logs -> every estimator's value for fixed predictions, with the true nuisances, against L_ideal
run_noise  simulated logs -> estimated noise rates and intervals, against the true ones
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causalrm_ray import metrics
from causalrm_ray.config.benchmark import HeadConfig
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.data.embeddings import GradedEmbeddings
from causalrm_ray.data.simulate import Selection, SimulatedLog, preferences, rescale, simulate, threshold
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import NOISE_FREE, Observations, load_method
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.nuisances.propensity import calibrate, cross_fit
from causalrm_ray.estimators.pipeline import ORACLE, RewardFits, fit_reward_models
from causalrm_ray.estimators.studies import noise_study
from causalrm_ray.estimators.studies.semisynthetic import bias_table
from causalrm_ray.models.heads import FeatureScorer, centre_and_scale
from causalrm_ray.types import SCENARIOS, NoiseRates

METRICS = ("r2", "mae", "mse", "auroc", "pearson")
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How a log is simulated; its slips are those of a scenario by number, or rates of their own."""

    alpha: float
    scenario: int | NoiseRates
    selection: Selection

    @property
    def name(self) -> str:
        """Its name, also of its file."""
        rates = self.rates
        slips = f"scenario-{self.scenario}" if self.is_scenario else f"rho-{rates.rho_01!r}-{rates.rho_10!r}"
        return f"alpha-{self.alpha!r}_{slips}_{self.selection}"

    @property
    def is_scenario(self) -> bool:
        """Whether the slips are those of a scenario."""
        return not isinstance(self.scenario, NoiseRates)

    @property
    def rates(self) -> NoiseRates:
        """The true rates of slips."""
        return self.scenario if isinstance(self.scenario, NoiseRates) else SCENARIOS[self.scenario]

    @property
    def labels(self) -> Row:
        """What tells it in tables: alpha, scenario (a number, or "rho 0.05/0.1"), selection, and the true rates."""
        rates = self.rates
        named = self.scenario if self.is_scenario else f"rho {rates.rho_01:g}/{rates.rho_10:g}"
        return {"alpha": self.alpha, "scenario": named, "selection": self.selection, **asdict(rates)}

    def log(self, levels: Tensor, features: Tensor, seed: int) -> SimulatedLog:
        """A log of the rows `levels` [N] with `features` [N, D]."""
        return simulate(levels, features, alpha=self.alpha, scenario=self.scenario, selection=self.selection, seed=seed)


@dataclass(frozen=True)
class Cell:
    """A setting and a seed."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Its name, also of its file."""
        return f"{self.setting.name}_seed-{self.seed}"


@dataclass(frozen=True)
class CellSpec:
    """What to fit in a cell, and how."""

    cell: Cell
    methods: tuple[str, ...]
    head: HeadConfig


@dataclass(frozen=True)
class BiasSpec:
    """How many logs of a setting to average over."""

    setting: Setting
    draws: int


def run_cell(order: CellSpec, data: tuple[GradedEmbeddings, GradedEmbeddings]) -> list[Row]:
    """A row per method: its metrics on the clean test split, the noise rates that it used, and the seconds of its fit.

    `data` are the train and the test split. What a method reads no rates for has none in its row. Where a method cannot be fitted
    (its rates cannot be estimated, or its risk diverges), `fault` says why and the metrics are None.
    """
    torch.set_num_threads(1)  # cells run side by side, one to a core
    cell, head = order.cell, order.head
    train, test = data
    features, fresh = _standardise(train.features, test.features)
    truth = preferences(test.levels, threshold(train.levels))
    log = cell.setting.log(train.levels, train.features, cell.seed)
    inputs, observations = FeatureRows(features), Observations(log.o, log.r)
    make_scorer = partial(FeatureScorer, features.shape[1], head.hidden, head.dropout)
    settings = FitSettings(head.epochs, head.lr, head.batch_size, head.patience, head.weight_decay, cell.seed, head.bf16)
    raw, _ = cross_fit(make_scorer, inputs, log.o, settings, seed=cell.seed)
    propensity = calibrate(raw, log.o, head.clip, seed=cell.seed).prob
    fit = partial(fit_reward_models, make_scorer, inputs, observations, propensity, settings=settings, seed=cell.seed)
    rates, no_rates = _estimate_rates(fit)
    rows = []
    for method in order.methods:
        needed = rates if method != ORACLE and "rates" in load_method(method).needs else NOISE_FREE
        row: Row = dict.fromkeys(("method", *METRICS, "rho_01_hat", "rho_10_hat", "fit_s", "fault"))
        row["method"] = method
        if needed is None:
            row["fault"] = no_rates
        else:
            row |= _fit_method(fit, method, needed, log.preference, FeatureRows(fresh), truth)
        rows.append(row)
    return rows


def run_bias(order: BiasSpec, data: tuple[GradedEmbeddings, GradedEmbeddings]) -> list[Row]:
    """The fields of each Bias: estimators with the true propensity, rates and preferences, on logs of the train split."""
    torch.set_num_threads(1)
    train, _ = data
    logs = [order.setting.log(train.levels, train.features, seed) for seed in range(order.draws)]
    observations = [Observations(log.o, log.r) for log in logs]
    truth = logs[0]
    table = bias_table(rescale(train.levels), truth.preference, truth.propensity, truth.rates, observations)
    return [asdict(bias) for bias in table]


@dataclass(frozen=True)
class NoiseSpec:
    """Whose noise rates to estimate how often: a world of estimators.noise_study."""

    setting: noise_study.Setting
    rows: int
    rates: NoiseRates

    @property
    def name(self) -> str:
        """Its name, also of its file."""
        return f"{self.setting}_{self.rows}_{self.rates.rho_01!r}_{self.rates.rho_10!r}"


def run_noise(order: NoiseSpec, told: tuple[int, int]) -> Row:
    """The fields of a StudyResult; `told` are the numbers of simulations and of bootstrap draws."""
    torch.set_num_threads(1)
    simulations, draws = told
    return asdict(noise_study.study(order.setting, order.rows, order.rates, simulations, draws))


def _fit_method(
    fit: Callable[..., RewardFits], method: str, rates: NoiseRates, preference: Tensor, fresh: FeatureRows, truth: Tensor
) -> Row:
    began = time.perf_counter()
    clean = preference if method == ORACLE else None
    try:
        fitted = fit(methods=(method,), rates=rates, clean_labels=clean).fits[method]
    except (InputError, FloatingPointError) as error:
        return {"fault": str(error)}
    seconds = time.perf_counter() - began
    used = {} if rates is NOISE_FREE else {"rho_01_hat": rates.rho_01, "rho_10_hat": rates.rho_10}
    used |= {f"{name}_hat": fitted.figures[name] for name in ("rho_01", "rho_10") if name in fitted.figures}
    prob = torch.sigmoid(predict(fitted.module, fresh))
    try:
        return {**{name: getattr(metrics, name)(prob, truth) for name in METRICS}, **used, "fit_s": seconds}
    except ValueError as error:  # a scorer that says the same of every row has no correlation
        return {**used, "fit_s": seconds, "fault": str(error)}


def _estimate_rates(fit: Callable[..., RewardFits]) -> tuple[NoiseRates | None, str]:
    """The rates, or none and why."""
    try:
        return fit(methods=()).rates, ""
    except InputError as error:
        return None, str(error)


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both [., D] centred on the train rows' mean and divided by one number, so that directions keep their relative weight."""
    centre, scale = centre_and_scale(train)
    return (train.float() - centre) / scale, (test.float() - centre) / scale
