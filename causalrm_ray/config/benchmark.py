"""What the benchmarks can be told: trees of their own, read like the main one. Every default lives here and only here."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from causalrm_ray.config.base import ClusterConfig, RunFolder, Section
from causalrm_ray.types import SCENARIOS, NoiseRates


def _leave_information(rho: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    for pair in rho:
        NoiseRates(*pair)
    return rho


class BenchmarkCluster(ClusterConfig):
    """The Ray cluster; its CPUs are as many cells at a time."""

    timeout_s: float = Field(3600.0, gt=0, description="longest wait for the next cell to end, seconds")


class HeadConfig(Section):
    """How a head on frozen features is fitted.

    The widths and the step are the authors' (arXiv 2603.18736). They train 600 epochs with 1e-6 of decay and no dropout; on a few
    thousand noisy labels that learns the noise, so ours are regularised and stop on held-out feedback.
    """

    hidden: tuple[int, ...] = Field((256, 64), description="widths of the hidden layers; [] is a linear head")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout after each hidden layer")
    lr: float = Field(5e-4, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of AdamW")
    batch_size: int = Field(512, ge=1, description="rows per optimizer step")
    epochs: int = Field(60, ge=1, description="most passes over the rows")
    patience: int = Field(10, ge=1, description="epochs without a lower held-out risk before a fit stops")
    bf16: bool = Field(False, description="compute outputs in bfloat16, twice as fast on processors that have it")
    clip: float = Field(0.1, gt=0, lt=1, description="lowest propensity used in a weight")

    @field_validator("hidden")
    @classmethod
    def _widths(cls, hidden: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in hidden):
            raise ValueError("must be at least 1")
        return hidden


class BenchmarkConfig(Section):
    """Methods on one graded data set: a cell for each alpha, scenario or rho, selection and seed."""

    train: Path = Field(description="graded embeddings to simulate a log from: embeddings, labels")
    test: Path = Field(description="graded embeddings of the clean test split")
    alpha: tuple[float, ...] = Field((0.5,), min_length=1, description="selection strengths; 1 is none, smaller is stronger")
    scenarios: tuple[Literal[1, 2], ...] = Field((1, 2), description="slips (rho_01, rho_10): 1 is (0.2, 0.1), 2 is (0.1, 0.2)")
    rho: tuple[tuple[float, float], ...] = Field(
        (), description="further slips as pairs [rho_01,rho_10], for the sensitivity to them: [[0.05,0.05],[0.1,0.1]]"
    )
    selection: tuple[Literal["label", "features"], ...] = Field(
        ("label", "features"), min_length=1, description="what drives feedback: the label (missing not at random), or features"
    )
    methods: tuple[str, ...] = Field((), description="estimators; none: every one, and oracle, fitted on true preferences")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="seeds of the simulated logs and of the fits")
    bias_draws: int = Field(
        50, ge=0, description="simulated logs under the table of biases, per setting; 0: no such table, else at least 2"
    )
    head: HeadConfig = HeadConfig()
    run: RunFolder = RunFolder()
    cluster: BenchmarkCluster = BenchmarkCluster()

    @field_validator("alpha")
    @classmethod
    def _strengths(cls, alpha: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < value <= 1 for value in alpha):
            raise ValueError("must be in (0, 1]")
        return alpha

    _rates = field_validator("rho")(_leave_information)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in seeds):
            raise ValueError("must be at least 0")
        return seeds

    @model_validator(mode="after")
    def _nothing_twice(self) -> BenchmarkConfig:
        for name in ("alpha", "scenarios", "rho", "selection", "methods", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: must not hold a value twice, got {list(values)}")
        if told := [pair for pair in self.rho if pair in [astuple(SCENARIOS[number]) for number in self.scenarios]]:
            raise ValueError(f"rho: must not repeat a scenario, got {told[0]}")
        if not self.scenarios and not self.rho:
            raise ValueError("scenarios: must hold one where rho holds none, got []")
        if self.bias_draws == 1:
            raise ValueError("bias_draws: must be 0 or at least 2, got 1")
        return self


class NoiseStudyConfig(Section):
    """Estimated noise rates against known ones, over simulated logs."""

    settings: tuple[Literal["features", "label", "clusters", "ramp", "weak"], ...] = Field(
        ("features", "clusters", "ramp", "label", "weak"),
        min_length=1,
        description="worlds: selection by features or label; opinions far apart, or a ramp; weak: no row is sure",
    )
    rows: tuple[int, ...] = Field((4_000, 20_000), min_length=1, description="impressions per log; a fifth bear feedback")
    rho: tuple[tuple[float, float], ...] = Field(
        ((0.2, 0.1), (0.1, 0.2)), min_length=1, description="true rates of slips as pairs [rho_01,rho_10]"
    )
    simulations: int = Field(200, ge=2, description="logs of each kind")
    draws: int = Field(200, ge=20, description="bootstrap draws under an interval")
    run: RunFolder = RunFolder()
    cluster: BenchmarkCluster = BenchmarkCluster()

    @field_validator("rows")
    @classmethod
    def _enough(cls, rows: tuple[int, ...]) -> tuple[int, ...]:
        if min(rows) < 500:
            raise ValueError(f"must be at least 500, got {min(rows)}")
        return rows

    _rates = field_validator("rho")(_leave_information)
