"""What a reward fit found: written once, by the worker of rank 0, and read as this type by role, driver and summary.

workers.fit_into --write--> CANDIDATE/report.json --read--> the gate, Refit, summary.json, report.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from actors.reward.promotion import Promotion
from causalrm_ray.checkpoint import CheckpointError, read_json, write_json
from causalrm_ray.data.log.clean import CleanCounts
from causalrm_ray.estimators.core.training import Epoch
from causalrm_ray.estimators.diagnostics.diagnose import FitDiagnostics
from causalrm_ray.estimators.diagnostics.groups import GroupReport
from causalrm_ray.estimators.nuisances.level import LevelReport
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate
from causalrm_ray.estimators.nuisances.propensity import PropensityReport
from causalrm_ray.estimators.nuisances.signals import SignalRate
from causalrm_ray.estimators.nuisances.state_choice import StateChoice
from causalrm_ray.types import NoiseRates

REPORT = "report.json"


class Report:
    """A dataclass that is written to a folder as report.json, by its fields' names, and read from there as the same type."""

    def write(self, folder: Path) -> None:
        """Write `folder`/report.json."""
        write_json(folder / REPORT, to_json(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The report in `folder`. Raises CheckpointError for one that is missing or has other fields."""
        try:
            return TypeAdapter(cls).validate_python(read_json(folder / REPORT))
        except ValidationError as error:
            raise CheckpointError(f"{folder / REPORT} must hold a {cls.__name__}: {error}") from error


@dataclass(frozen=True)
class MethodReport:
    """One method's fit: its held-out observed risk, the epoch that was kept, what else it estimated, and all epochs."""

    heldout_risk: float
    best_epoch: int
    figures: Mapping[str, float] = field(default_factory=dict)
    epochs: tuple[Epoch, ...] = ()


@dataclass(frozen=True)
class LogDiagnostics(FitDiagnostics):
    """Diagnostics of the model that may serve, and of parts of the log: `groups` by traits and by lengths, and by signal (None
    without a ranking)."""

    groups: Mapping[str, GroupReport]
    signals: Mapping[str, SignalRate] | None


@dataclass(frozen=True)
class RewardReport(Report):
    """All methods of one fit. `rates` of the noise were estimated (`noise`), given, or found by the method along with the opinion
    (their intervals are among the diagnostics); `serving_risk` is the held-out risk of the model that served as `serving_version`
    on the same rows (None: none served); `level` is what judged rows said of each method's model (empty without
    `feedback.clean`)."""

    methods: Mapping[str, MethodReport]
    diagnostics: LogDiagnostics
    rates: NoiseRates
    noise: NoiseEstimate | None
    heldout_rows: int
    serving_risk: float | None
    serving_version: int
    level: Mapping[str, LevelReport] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateFit:
    """A fit's models in `folder`/METHOD and its report; `seconds` in all, `train_seconds` of them by the worker of rank 0: the
    first fit starts the workers besides."""

    folder: Path
    report: RewardReport
    seconds: float
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class VersionedPropensity(PropensityReport, Report):
    """The report of a propensity model, and its version: fits are counted from 1.

    `split_by` is the column by which its folds are split ("": in a version that did not record it);
    `log_warnings` are sentences about the log (see data.users.clusters); `choice` says which states of the backbone all models
    of the fit read (None: in a version that did not record it).
    """

    version: int
    split_by: str = ""
    log_warnings: tuple[str, ...] = ()
    choice: StateChoice | None = None


@dataclass(frozen=True)
class Refit:
    """All that a refit found; `folders` of the methods' models are relative to the run's, which may move; `clean` counts the rows
    of `feedback.clean`, None without it."""

    propensity: VersionedPropensity
    reward: RewardReport
    folders: Mapping[str, str]
    seconds: float
    train_seconds: float
    promotion: Promotion
    clean: CleanCounts | None = None


def to_json(report: Any) -> Any:
    """A report as JSON, by its fields' names."""
    return TypeAdapter(type(report)).dump_python(report, mode="json")
