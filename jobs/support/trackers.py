"""Where a run's metrics go besides its own metrics.jsonl: TensorBoard, Weights & Biases, MLflow, or a class of the user's.

    TrackedRun --start--> tracker <--log-- metrics of each step      a resumed run continues the same run in the tracker
                                  <--finish-- summary

A tracker of one's own: a class with the methods of `Tracker`, named in loop.trackers by its import path.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pandas as pd

from causalrm_ray.errors import ConfigError
from causalrm_ray.files import write_whole
from causalrm_ray.registry import TRACKERS
from jobs.support.log import warn, without_secrets

PROJECT = "causalrm-ray"  # where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names no other


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run: its name, folder, resolved configuration (without passwords), and the first step to come."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    first_step: int


class Tracker(Protocol):
    """Constructing one imports what it needs and raises ConfigError where that is missing; nothing is written before `start`.

    An error while it logs ends the run, which can go on from its checkpoint.
    """

    def start(self, run: TrackedRun) -> None:
        """Begin to track, or continue the run of an earlier attempt."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Track the metrics of a step."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Write out everything; `summary` is summary.json, None for a run that was stopped or failed."""


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers of a run, ended with the block. Raises ConfigError for one that cannot be imported."""

    def __init__(self, names: Sequence[str]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = TRACKERS.load(name)()
            except ValueError as error:
                raise ConfigError(f"loop.trackers: {error}") from error
        self._summary: Mapping[str, Any] | None = None
        self._started: list[Tracker] = []

    def start(self, run: TrackedRun) -> None:
        """Begin to track. Raises ConfigError for one that cannot start; a run that continues warns, and goes on without it."""
        for name, tracker in self._trackers.items():
            try:
                tracker.start(run)
                self._started.append(tracker)
            except Exception as error:  # of any package
                why = without_secrets(f"loop.trackers: {name} cannot start: {error}")
                if run.first_step == 0:
                    raise ConfigError(why) from error
                warn(f"{why}; the run continues without it")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Track the metrics of a step."""
        for tracker in self._started:
            tracker.log(step, metrics)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Take the summary, which goes to each tracker at the end of the block."""
        self._summary = summary

    def __exit__(self, *error: object) -> None:
        while self._started:
            try:
                self._started.pop().finish(self._summary)
            except Exception as fault:  # noqa: BLE001 - of any package: the run's own end, or its error, must not be replaced
                warn(f"loop.trackers: {fault}")


class TensorBoard:
    """Scalars under `tensorboard/` of the run's folder."""

    def __init__(self) -> None:
        self._writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def start(self, run: TrackedRun) -> None:
        self._writer = self._writer_class(run.folder / "tensorboard", purge_step=run.first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; who logs in, the project and the mode are given by its own variables (WANDB_API_KEY, ...).

    Steps that a resumed run repeats are logged again: "step" is a metric, since W&B drops a step of its own that comes twice.
    """

    def __init__(self) -> None:
        self._wandb = _package("wandb")

    def start(self, run: TrackedRun) -> None:
        run_id = _kept_id(run.folder / "wandb_run_id", lambda: uuid4().hex[:8])
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            resume="allow",
            name=run.name,
            dir=run.folder,
            settings=self._wandb.Settings(silent=True, disable_git=True, disable_code=True),
        )
        self._run.config.update(dict(run.config), allow_val_change=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._run.summary.update(numbers(summary or {}))
        self._run.finish(exit_code=1 if summary is None else 0)


class MlFlow:
    """A run of MLflow; the server and the experiment are given by its own variables (MLFLOW_TRACKING_URI, ...)."""

    def __init__(self) -> None:
        self._mlflow = _package("mlflow")

    def start(self, run: TrackedRun) -> None:
        self._client = self._mlflow.MlflowClient()
        self._id = _kept_id(run.folder / "mlflow_run_id", lambda: self._create(run))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
        for key, value in leaves(run.config).items():  # those of the start: MLflow lets no parameter change
            self._client.log_param(run_id, key, value, synchronous=True)
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entity = self._mlflow.entities.Metric
        now = round(time.time() * 1000)
        self._client.log_batch(self._id, [entity(name, value, now, step) for name, value in metrics.items()])

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        for name, value in numbers(summary or {}).items():
            self._client.log_metric(self._id, f"summary/{name}", value)
        self._client.set_terminated(self._id, "FINISHED" if summary is not None else "FAILED")


def leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    return {str(name): value for name, value in pd.json_normalize(dict(tree)).to_dict("records")[0].items()}


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary by dotted key; texts, lists and the diagnostics are left to the run's folder."""
    rest = {name: value for name, value in summary.items() if name != "diagnostics"}
    return {name: float(value) for name, value in leaves(rest).items() if isinstance(value, int | float)}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"loop.trackers: {name} needs its package ({error}): pip install 'causalrm-ray[tracking]'") from error


def _kept_id(file: Path, create: Callable[[], str]) -> str:
    """The id under which a tracker knows the run, made at its first start and kept in the run's folder."""
    if not file.exists():
        made = create()
        write_whole(file, lambda unfinished: unfinished.write_text(made, encoding="utf-8"))
    return file.read_text(encoding="utf-8")
