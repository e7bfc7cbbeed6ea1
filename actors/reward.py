"""The reward role: fits reward models through Ray Train, lets one serve behind a gate, and scores token ids with it.

    snapshot + propensities -> fit (W workers, DDP) -> FOLDER/CANDIDATE/METHOD -> promote (gate) -> score

One launch of Ray Train fits all methods that are asked for; `config.method` is the one that may serve, the others for reports.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.train import Result
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # how a worker that died is told
from ray.train.v2.api.config import LoggingConfig, RunConfig, ScalingConfig  # ray.train names a union of both versions
from ray.train.v2.api.exceptions import WorkerGroupError

from actors.fit_order import REPORT, FitOrder
from actors.placement import restarted
from causalrm_ray.checkpoint import atomic_folder, read_json, verify_folder, write_json
from causalrm_ray.checks import InputError
from causalrm_ray.config import RewardConfig
from causalrm_ray.data.snapshot import check_log, read_snapshot
from causalrm_ray.estimators.fit import Shard
from causalrm_ray.models.reward_model import SequenceScorer, padding_token, score_rows
from causalrm_ray.models.text import load_tokenizer

GATE_TOLERANCE = 0.01  # a refit serves if its held-out observed risk is at most this above the serving model's
SERVING = "serving.json"
WORKER_FAILURES = 3  # times that a fit starts anew where a worker died
SCRATCH = ".ray_train"  # where Ray Train keeps a fit's checkpoint until it is moved to its place


@dataclass(frozen=True)
class RewardReport:
    """What a fit made: models in `folder`/METHOD, and `figures` (JSON, see train_workers.describe).

    `seconds` of the whole launch, `train_seconds` of them by the worker of rank 0.
    """

    candidate: str
    folder: Path
    figures: dict[str, Any]
    seconds: float
    train_seconds: float


@dataclass(frozen=True)
class Promotion:
    """Whether a candidate serves now, why, and the version that serves."""

    promoted: bool
    reason: str
    version: int


class RewardActor:
    """Fits, gates and serves reward models. `version` counts promotions, from 1; 0 is none."""

    def __init__(
        self,
        backbone: str,
        config: RewardConfig,
        *,
        max_length: int,
        seed: int,
        folder: Path,
        timeout_s: float,
        use_gpu: bool = False,
        device: str = "cpu",
    ) -> None:
        """`backbone` is a folder or hub id of a causal model with its tokenizer; `folder` must be shared by all nodes.

        `max_length` in tokens; `timeout_s` bounds the start of the workers and each exchange between them; `use_gpu` gives each
        worker a GPU; `device` is where the serving model lies. Raises ValueError for a tokenizer that cannot pad rows.
        """
        torch.set_num_threads(1)  # sums in one order, so that a repeated score repeats its bits
        self._backbone = backbone
        self._config = config
        self._max_length = max_length
        self._seed = seed
        self._folder = folder.resolve()
        self._timeout_s = timeout_s
        self._use_gpu = use_gpu
        self._device = device
        self._scorers: dict[str, SequenceScorer] = {}
        self._serving: Path | None = None
        self._version = 0
        padding_token(load_tokenizer(backbone))  # saving would fail without one: better now than after a fit
        if restarted() and (self._folder / SERVING).exists():
            self.load(**read_json(self._folder / SERVING))

    @property
    def version(self) -> int:
        """Version that serves; 0 before the first promotion."""
        return self._version

    def fit(
        self,
        snapshot: Path,
        propensity: np.ndarray,
        methods: Sequence[str],
        *,
        candidate: str,
        start: Path | None = None,
        clean_labels: np.ndarray | None = None,
    ) -> RewardReport:
        """Fit `methods` on `snapshot` and write them to `folder`/`candidate`, whole or not at all; nothing is promoted.

        `propensity` [N] is out of fold and clipped; `clean_labels` [N] are for the method "oracle" only. Fits begin from the
        states of the model in `start` (none: the backbone) under a blank head. The propensity model is a good start: it has
        learned from all impressions what moves users, the labels only from a few. The serving model is none: its states have
        seen the labels. Only methods that fit heads on the backbone's own states and then teach a model go on from the one that
        serves, which learns from those heads alone. The serving model's risk is measured on the same held-out rows.
        Raises InputError for a log that cannot be fitted, ValueError for other bad input, WorkerGroupError if a worker dies.
        """
        check_log(read_snapshot(snapshot))
        if self._config.method not in methods:
            raise ValueError(f"methods must include the one that serves, {self._config.method!r}, got {list(methods)}")
        order = FitOrder(
            snapshot=Path(snapshot).resolve(),
            backbone=self._backbone,
            start=str(start or self._backbone),
            serving=str(self._serving) if self._serving else None,
            serving_version=self._version,
            propensity=propensity,
            clean_labels=clean_labels,
            methods=tuple(methods),
            config=self._config,
            max_length=self._max_length,
            seed=self._seed,
        )
        started = time.perf_counter()
        folder = self._folder / candidate
        train_seconds = self._launch(order, candidate, folder) if self._config.workers else self._fit_here(order, folder)
        return RewardReport(candidate, folder, _figures(folder), time.perf_counter() - started, train_seconds)

    def promote(self, candidate: str) -> Promotion:
        """Let `candidate` serve if its held-out observed risk is at most the serving model's plus GATE_TOLERANCE.

        The first candidate always serves. Raises ValueError if another model serves than the candidate was measured against.
        """
        folder = self._folder / candidate
        verify_folder(folder)
        figures = _figures(folder)
        if self._serving == (folder / self._config.method).resolve():  # asked again after a restart
            return Promotion(True, "it serves already", self._version)
        if figures["serving_version"] != self._version:
            raise ValueError(
                f"{candidate} must have been measured against serving version {self._version}, got {figures['serving_version']}"
            )
        risk, serving_risk = figures["methods"][self._config.method]["heldout_risk"], figures["serving_risk"]
        if serving_risk is None:
            return self._promoted(folder, f"first model, held-out risk {risk:.4f}")
        limit = serving_risk + GATE_TOLERANCE
        if risk <= limit:
            return self._promoted(folder, f"held-out risk {risk:.4f} <= {limit:.4f}")
        return Promotion(False, f"held-out risk {risk:.4f} > {limit:.4f}", self._version)

    def score(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
        """Logits [B] (float32) of rows of token ids, prompt + response, and the version that gave them.

        Raises RuntimeError before the first promotion, ValueError for a row of more than `max_length` tokens.
        """
        if self._serving is None:
            raise RuntimeError("no reward model serves yet: call fit and promote, or load, first")
        return self.score_with(str(self._serving), sequences), self._version

    def score_with(self, model: str, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [B] by another model, a folder or hub id, for reports: that of another method, or of another version."""
        for number, row in enumerate(sequences):
            if len(row) > self._max_length:
                raise ValueError(f"row {number} must have at most {self._max_length} tokens (model.max_length), got {len(row)}")
        if model not in self._scorers:
            self._scorers[model] = SequenceScorer.from_pretrained(model).to(self._device)
        return score_rows(self._scorers[model], sequences).numpy()

    def state(self) -> dict[str, Any]:
        """Which model serves, as JSON: {"folder", "version"}, the arguments of `load`."""
        return {"folder": str(self._serving) if self._serving else None, "version": self._version}

    def load(self, folder: str | Path, version: int) -> None:
        """Serve the model saved in `folder` (of one method) as `version`; what is served is noted for a role that restarts."""
        verify_folder(Path(folder).resolve().parent)
        self._scorers.clear()
        self._serving, self._version = Path(folder).resolve(), version
        self._scorers[str(self._serving)] = SequenceScorer.from_pretrained(self._serving).to(self._device)
        write_json(self._folder / SERVING, self.state())

    def _promoted(self, folder: Path, reason: str) -> Promotion:
        self.load(folder / self._config.method, self._version + 1)
        return Promotion(True, reason, self._version)

    def _fit_here(self, order: FitOrder, folder: Path) -> float:
        from actors.train_workers import fit_into

        with atomic_folder(folder) as aside:
            return fit_into(aside, order, Shard(), torch.device(self._device))

    def _launch(self, order: FitOrder, candidate: str, folder: Path) -> float:
        """Run the workers and move what rank 0 saved to `folder`. Returns the seconds that rank 0 worked."""
        for key, value in (
            ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1"),  # the default polls so rarely that a launch takes 20 s
            ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(self._timeout_s)),
            ("RAY_TRAIN_ENABLE_PRINT_PATCH", "0"),  # the patched print breaks the hashing that `datasets` does of what it reads
        ):
            os.environ.setdefault(key, value)

        def train_function(loop: dict[str, FitOrder]) -> None:
            # Defined here, it travels by value: Ray Train's controller need not import what only workers use.
            from actors.train_workers import work

            work(loop["order"])

        scratch = self._folder / SCRATCH
        trainer = TorchTrainer(
            train_function,
            train_loop_config={"order": order},
            scaling_config=ScalingConfig(
                num_workers=self._config.workers,
                use_gpu=self._use_gpu,
                resources_per_worker=None if self._use_gpu else {"CPU": 0.01},
            ),
            # Reductions of figures happen on the CPU, those of gradients where the model lies.
            torch_config=TorchConfig("cpu:gloo,cuda:nccl" if self._use_gpu else "gloo", timeout_s=int(self._timeout_s)),
            run_config=RunConfig(name=candidate, storage_path=str(scratch), logging_config=LoggingConfig(log_level="ERROR")),
        )
        result = _fit_again_where_workers_die(trainer, scratch / candidate)
        if result.checkpoint is None or result.metrics is None:
            raise RuntimeError(f"Ray Train ended fit {candidate} without a checkpoint")
        with result.checkpoint.as_directory() as saved, atomic_folder(folder) as aside:
            shutil.copytree(saved, aside, dirs_exist_ok=True)
        shutil.rmtree(scratch / candidate)
        return result.metrics["train_seconds"]


def _fit_again_where_workers_die(trainer: TorchTrainer, scratch: Path) -> Result:
    """The result of a fit that begins anew up to WORKER_FAILURES times; what a worker itself raises ends it."""
    failures = 0
    while True:
        shutil.rmtree(scratch, ignore_errors=True)  # Ray Train would resume what a killed run left there
        try:
            return trainer.fit()
        except WorkerGroupError as error:
            causes = error.worker_failures.values()
            for cause in causes:
                if isinstance(cause, InputError):  # every worker reads the same log and meets the same fault
                    raise cause from error
            failures += 1
            if failures > WORKER_FAILURES or not any(isinstance(cause, WorkerHealthCheckFailedError) for cause in causes):
                raise


def _figures(folder: Path) -> dict[str, Any]:
    return read_json(folder / REPORT)
