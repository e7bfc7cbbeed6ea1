"""Options of `benchmark` and `noise-study`: trees of their own, read like the main one. Every default lives only here."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from causalrm_ray.config.base import ClusterConfig, ComparedName, Distinct, NotEmpty, RatePair, RunFolder, Section
from causalrm_ray.types import FEEDBACK_RATE, SCENARIOS, HeadKind, Selection


class BenchmarkCluster(ClusterConfig):
    """The Ray cluster; its CPUs are as many cells at a time."""

    timeout_s: float = Field(3600.0, gt=0, description="longest wait for the next cell to end, seconds")


class HeadConfig(Section):
    """How a head on frozen features is fitted.

    The widths and the step are the authors' (arXiv 2603.18736). They train 600 epochs with 1e-6 of decay and no dropout; on a few
    thousand noisy labels that learns the noise, so ours are regularised and stop on held-out feedback.
    """

    kind: HeadKind | None = Field(
        None,
        description="mlp, linear, or boosting: gradient-boosted trees, for naive, ips, snips, two_stage and auto; if not given, "
        "mlp, and for two_stage and auto whichever of mlp and boosting predicts held-out feedback better",
    )
    hidden: tuple[PositiveInt, ...] = Field((256, 64), description="widths of the hidden layers; [] is a linear head")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout after each hidden layer")
    lr: float = Field(5e-4, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of AdamW")
    batch_size: int = Field(512, ge=1, description="rows per optimizer step")
    epochs: int = Field(60, ge=1, description="most passes over the rows")
    patience: int = Field(10, ge=1, description="epochs without a lower held-out risk before a fit stops")
    bf16: bool = Field(False, description="compute outputs in bfloat16, twice as fast on processors that have it")
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="lowest propensity used in a weight; if not given, a quarter of the share of rows with feedback, and 0.1 at "
        "most",
    )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers; none of a linear head."""
        return () if self.kind == "linear" else self.hidden


class BenchmarkConfig(Section):
    """Methods on one graded data set: a cell for each alpha, scenario or rho, selection and seed.

    Selection by popularity, or mixed, does not depend on alpha and has one cell for all of them.
    """

    train: Path = Field(description="graded embeddings to simulate a log from: embeddings, labels, and prompts, if known")
    test: Path = Field(description="graded embeddings of the clean test split")
    alpha: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], NotEmpty, Distinct] = Field(
        (0.5,), description="strengths of selection by label, features or trait; 1 is none, smaller is stronger"
    )
    scenarios: Annotated[tuple[Literal[1, 2], ...], Distinct] = Field(
        (1, 2), description="noise rates (rho_01, rho_10): 1 is (0.2, 0.1), 2 is (0.1, 0.2)"
    )
    rho: Annotated[tuple[RatePair, ...], Distinct] = Field(
        (), description="further noise rates as pairs [rho_01,rho_10], for the sensitivity to them: [[0.05,0.05],[0.1,0.1]]"
    )
    selection: Annotated[tuple[Selection, ...], NotEmpty, Distinct] = Field(
        ("label", "features"),
        description="what drives feedback: the label (missing not at random); features; trait: the pleased give it where the "
        "features have a trait, else the displeased; popularity, log-normal by prompt, or along a fixed direction of the "
        "features where the file numbers no prompts; mixed: popularity, and the pleased three times as readily",
    )
    feedback_rate: float = Field(FEEDBACK_RATE, gt=0, lt=1, description="mean share of answers that get feedback")
    strata: bool = Field(
        False,
        description="give methods that can use traits those that the log carries: trait's own, or thirds of popularity "
        "(popularity, mixed)",
    )
    methods: Annotated[tuple[ComparedName, ...], Distinct] = Field(
        (), description="estimators; []: every one, and oracle, fitted on true preferences"
    )
    seeds: Annotated[tuple[NonNegativeInt, ...], NotEmpty, Distinct] = Field(
        (0, 1, 2), description="seeds of the simulated logs and of the fits"
    )
    bias_draws: int = Field(
        50, ge=0, description="simulated logs under the table of biases, per setting; 0: no such table, else at least 2"
    )
    head: HeadConfig = HeadConfig()
    run: RunFolder = RunFolder()
    cluster: BenchmarkCluster = BenchmarkCluster()

    @model_validator(mode="after")
    def _cells(self) -> BenchmarkConfig:
        if repeated := {astuple(SCENARIOS[number]) for number in self.scenarios} & set(self.rho):
            raise ValueError(f"rho: must not repeat a scenario, got {min(repeated)}")
        if not self.scenarios and not self.rho:
            raise ValueError("scenarios: must hold one where rho holds none, got []")
        if self.bias_draws == 1:
            raise ValueError("bias_draws: must be 0 or at least 2, got 1")
        return self


class NoiseStudyConfig(Section):
    """Estimated noise rates against known ones, over simulated logs."""

    settings: Annotated[tuple[Literal["features", "label", "clusters", "ramp", "weak"], ...], NotEmpty] = Field(
        ("features", "clusters", "ramp", "label", "weak"),
        description="worlds: selection by features or label; opinions far apart, or a ramp; weak: no row is sure",
    )
    rows: Annotated[tuple[Annotated[int, Field(ge=500)], ...], NotEmpty] = Field(
        (4_000, 20_000), description="impressions per log; a fifth get feedback"
    )
    rho: Annotated[tuple[RatePair, ...], NotEmpty] = Field(
        ((0.2, 0.1), (0.1, 0.2)), description="true noise rates as pairs [rho_01,rho_10]"
    )
    simulations: int = Field(200, ge=2, description="logs of each kind")
    draws: int = Field(200, ge=20, description="bootstrap draws under an interval")
    run: RunFolder = RunFolder()
    cluster: BenchmarkCluster = BenchmarkCluster()
