"""Ray Train workers that stay between reward fits: to start them takes longer than most fits."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import Result
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # a worker that died
from ray.train.v2.api.config import LoggingConfig, RunConfig, ScalingConfig  # ray.train names a union of both versions
from ray.train.v2.api.exceptions import WorkerGroupError

from actors.cluster.place import Placement, end, place
from actors.reward.fit_spec import FitQueue, FitSpec
from causalrm_ray.errors import InputError

DEATHS = 3  # of workers, after each of which a fit begins again
CALLERS = 8  # of the queue's methods at once: a fit that waits, a worker that waits, one that is done
POLL_S = 0.5  # between two looks at whether the workers still run
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # the default polls so rarely that the workers take 20 s more to start
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less: a fit that loses a worker begins again, warned or not
    "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S": "1e9",  # workers wait for a fit as long as it takes
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patched print breaks the hashing that `datasets` does of what it reads
}


class RewardTrainer:
    """Ray Train workers that do one fit after another; they start with the first and end with `close` or this process."""

    def __init__(self, workers: int, scratch: Path, *, use_gpu: bool, timeout_s: float) -> None:
        """`scratch`, on storage that all nodes share, is for Ray Train's own files; with `use_gpu` each worker has a GPU;
        `timeout_s` bounds the start of the workers and each exchange between them."""
        self._workers = workers
        self._scratch = scratch
        self._use_gpu = use_gpu
        self._timeout_s = timeout_s
        self._queue: Any = None
        self._running: Future[Result] | None = None

    def fit(self, spec: FitSpec, folder: Path) -> float:
        """Have `spec` fitted and written to `folder`, whole or not at all. Returns the seconds that rank 0 worked.

        A fit whose workers die begins again, up to DEATHS times, after other errors once: a death may show first as a peer's lost
        connection. Raises InputError for what cannot be fitted, WorkerGroupError for other errors of workers.
        """
        failures = 0
        while True:
            try:
                return self._fit(spec, folder)
            except (WorkerGroupError, RayActorError) as error:
                self._leave()
                failures += 1
                causes = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
                for cause in causes:
                    if isinstance(cause, InputError):  # every worker reads the same log and meets the same fault
                        raise cause from error
                if failures > (DEATHS if any(isinstance(cause, WorkerHealthCheckFailedError) for cause in causes) else 1):
                    raise

    def close(self) -> None:
        """End the workers, if there are any, and wait for that. A later fit starts new ones."""
        if self._running is not None and not self._running.done():
            ray.get(self._queue.close.remote())
            self._running.exception(self._timeout_s)
        self._leave()

    def _fit(self, spec: FitSpec, folder: Path) -> float:
        if self._running is not None and self._running.done():  # they died while there was nothing to do
            self._leave()
        if self._running is None:
            self._queue = place(FitQueue, Placement(concurrency=CALLERS, beside_driver=True))
            self._running = self._start()
        fitted = self._queue.fitted.remote(spec, folder.resolve())
        while not ray.wait([fitted], timeout=POLL_S)[0]:
            if self._running.done():
                raise self._running.exception() or RuntimeError("the Ray Train workers ended in the middle of a fit")
        return ray.get(fitted)

    def _leave(self) -> None:
        """End what is left of the workers and their queue: a worker that waits there gets an error, and ends."""
        queue, running = self._queue, self._running
        self._queue = self._running = None
        if queue is not None:
            end(queue)
        if running is not None:
            running.exception(self._timeout_s)

    def _start(self) -> Future[Result]:
        for key, value in {**SETTINGS, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(self._timeout_s)}.items():
            os.environ.setdefault(key, value)
        shutil.rmtree(self._scratch, ignore_errors=True)  # Ray Train would resume what a killed run left there

        def train_function(loop: dict[str, Any]) -> None:
            # Defined here, it travels by value: Ray Train's controller need not import what only workers use.
            from actors.reward.workers import work

            work(loop["queue"])

        trainer = TorchTrainer(
            train_function,
            train_loop_config={"queue": self._queue},
            scaling_config=ScalingConfig(
                num_workers=self._workers,
                use_gpu=self._use_gpu,
                resources_per_worker=None if self._use_gpu else {"CPU": 0.01},
            ),
            # Reductions of figures happen on the CPU, those of gradients where the model lies.
            torch_config=TorchConfig("cpu:gloo,cuda:nccl" if self._use_gpu else "gloo", timeout_s=int(self._timeout_s)),
            run_config=RunConfig(
                name="workers", storage_path=str(self._scratch), logging_config=LoggingConfig(log_level="ERROR")
            ),
        )
        running: Future[Result] = Future()
        threading.Thread(target=_run, args=(trainer, running), name="reward-trainer", daemon=True).start()
        return running


def _run(trainer: TorchTrainer, running: Future[Result]) -> None:
    try:
        running.set_result(trainer.fit())
    except BaseException as error:  # noqa: BLE001 - this thread has no caller: the error goes to the fit that waits
        running.set_exception(error)
