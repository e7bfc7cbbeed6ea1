"""What every job's configuration is made of: closed, frozen sections, a run's folder, the cluster. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from causalrm_ray.registry import ALGORITHMS, ENGINES, ESTIMATORS, FORMATS, TRACKERS, Registry
from causalrm_ray.types import NoiseRates

IN_PROCESS = "in-process"  # the address of no cluster at all


@dataclass(frozen=True)
class Choice:
    """What an option may name: an object of a registry, by name or import path, or one of `others`."""

    registry: Registry
    others: tuple[str, ...] = ()

    def check(self, name: str) -> str:
        """`name`, if it may be chosen. Raises ValueError that names the nearest."""
        return name if name in self.others else self.registry.check(name)

    def names(self) -> tuple[str, ...]:
        """All names that there are now, those of other packages included."""
        return (*self.registry.names(), *self.others)


def chosen_from(registry: Registry, *others: str) -> Any:
    """The type of an option whose value is a Choice."""
    choice = Choice(registry, others)
    return Annotated[str, AfterValidator(choice.check), choice]


EstimatorName = chosen_from(ESTIMATORS)
ComparedName = chosen_from(ESTIMATORS, "oracle")
AlgorithmName = chosen_from(ALGORITHMS)
EngineName = chosen_from(ENGINES)
FormatName = chosen_from(FORMATS, "auto")
TrackerName = chosen_from(TRACKERS)


def _check_rates(pair: tuple[float, float]) -> tuple[float, float]:
    NoiseRates(*pair)
    return pair


def _check_not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("must hold at least one value")
    return values


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"must not hold a value twice, got {list(values)}")
    return values


NotEmpty = AfterValidator(_check_not_empty)  # unlike min_length it does not count values that are refused
Distinct = AfterValidator(_check_distinct)
RatePair = Annotated[tuple[float, float], AfterValidator(_check_rates)]  # rho_01, rho_10
LoraTargetNames = Literal["auto"] | Annotated[tuple[str, ...], NotEmpty]


class Section(BaseModel):
    """A part of the tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RunFolder(Section):
    """The run's folder."""

    name: str = Field(
        "run",
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run, its folder under `dir`; the job's name if not given",
    )
    dir: Path = Field(Path("runs"), description="folder that holds all runs")
    resume: bool = Field(False, description="continue from the newest complete checkpoint of the run")
    cache: Path = Field(
        Path("~/.cache/causalrm_ray"), description="folder of what runs share: states of backbones, embedded models, caches"
    )

    @property
    def path(self) -> Path:
        """The run's own folder, absolute: the same in every process of the run."""
        return (self.dir / self.name).expanduser().resolve()


class RunConfig(RunFolder):
    """The run's folder and seed."""

    seed: int = Field(0, ge=0, description="seed of everything random in the run")


class ClusterConfig(Section):
    """The Ray cluster."""

    address: str | None = Field(
        None,
        description="address of a running Ray cluster ('auto' finds it); null starts one on this machine; 'in-process': no Ray, "
        "all roles in this process, for a debugger",
    )
    timeout_s: float = Field(
        300.0, gt=0, description="longest wait for any one phase (start, generate, update, sync, fit), seconds"
    )
