"""A run's folder: resolved configuration, metrics, kept rollouts, summary, checkpoints; and the run's peak memory."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from rich.console import Console

from actors.cluster.telemetry import event
from causalrm_ray.checkpoint import newest_complete, read_json, step_of, steps, write_json
from causalrm_ray.config.options import dump_config
from causalrm_ray.config.train import Config
from causalrm_ray.data.rollouts import forget_rollouts, rollout_path, write_rollout
from causalrm_ray.data.snapshots.segments import SEGMENTS, drop_snapshot, drop_unused
from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole
from causalrm_ray.types import Scored
from jobs.support.log import mask_secrets, warn
from jobs.support.trackers import TrackedRun, Trackers

TIMINGS = frozenset(("seconds", "sync_seconds", "sync_gb_per_s"))  # figures of a step that no other run repeats
STOPPED = 128 + signal.SIGTERM  # exit status of a job that was asked to stop, and saved

console = Console(highlight=False)


class Run:
    """One run's artefacts. A new run must not exist yet, unless it is a `fresh_start` over an attempt without a checkpoint;
    with `run.resume` it continues from its newest complete checkpoint."""

    def __init__(self, config: Config, fresh_start: bool = False, trackers: Trackers | None = None) -> None:
        self.path, self._keep = config.run.path, config.loop.keep
        self._trackers = trackers or Trackers(())
        self.checkpoint: Path | None = None
        if config.run.resume:
            self._find_checkpoint()
        elif not fresh_start and any((self.path / mark).exists() for mark in ("checkpoints", "summary.json", "feedback.db")):
            resume = "continue it with resume=true, " if (self.path / "checkpoints").exists() else ""
            raise InputError(f"{self.path} holds a run already: {resume}remove it, or choose another run.name")
        if not config.run.resume:  # of a log that was there before
            for name in ("snapshots", SEGMENTS):
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._drop_metrics_from(self.first_step)
        dump_config(config, self.path / "config.yaml")

    @property
    def first_step(self) -> int:
        """The first step to do: 0, or the one after the checkpoint."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, and log the same to the trackers."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._trackers.log(step, metrics)

    def start_tracking(self, config: Config) -> None:
        """Start the trackers; what they get of the configuration holds no secrets."""
        tree = mask_secrets(config.model_dump(mode="json"))
        self._trackers.start(TrackedRun(config.run.name, self.path, tree, self.first_step))

    @staticmethod
    def read_metrics(folder: Path) -> list[dict[str, Any]]:
        """The metrics of the run in `folder`, one mapping a step."""
        return [row for _, row in _lines(folder / "metrics.jsonl")]

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, and the diagnostics of a fit, if there was one, also as diagnostics.json."""
        write_json(self.path / "summary.json", dict(summary))
        if "diagnostics" in summary:
            write_json(self.path / "diagnostics.json", summary["diagnostics"])
            for text in summary["diagnostics"]["warnings"]:
                event("warning", level=logging.WARNING, text=text)
        self._trackers.summarise(summary)

    def retire(self, step: int) -> None:
        """Checkpoint `step` was saved: delete all but the newest `loop.keep` up to it, and the refits that nothing needs now.

        Those that serve in a checkpoint are needed, the first, whose models the report compares, and the newest. Checkpoints of
        later steps could not be resumed from: they are left to be replaced.
        """
        if self._keep is None:
            return
        checkpoints = [path for path in steps(self.path / "checkpoints") if step_of(path) <= step]
        for path in checkpoints[: -self._keep]:
            shutil.rmtree(path)
        refits = steps(self.path / "propensity")
        needed = {"log", *(path.name for path in refits[-1:])}
        for path in checkpoints[-self._keep :]:
            with suppress(InputError):  # a damaged one serves nothing
                serving = read_json(path / "facts.json")["serving"]
                needed |= {Path(serving["reward"]["folder"]).parts[1], Path(serving["propensity"]).name}
        for path in refits:
            if path.name not in needed:
                shutil.rmtree(self.path / "reward" / path.name, ignore_errors=True)
                drop_snapshot(self.path / "snapshots" / f"{path.name}.parquet")
                shutil.rmtree(path)
        drop_unused(self.path)

    def _find_checkpoint(self) -> None:
        self.checkpoint, skipped = newest_complete(self.path / "checkpoints")
        for reason in skipped:
            warn(f"skipped checkpoint: {reason}")
        if self.checkpoint is None:
            raise InputError(f"resume=true, but {self.path / 'checkpoints'} holds no complete checkpoint")
        console.print(f"continuing from {self.checkpoint}", markup=False)

    def _drop_metrics_from(self, step: int) -> None:
        """Drop the lines of steps that will be repeated, and a half-written last line."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = itertools.takewhile(lambda found: found[1]["step"] < step, _lines(file))
        text = "".join(line for line, _ in kept)
        write_whole(file, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, its metrics) of metrics.jsonl; a half-written last line is ignored. Raises InputError for a damaged one."""
    found = []
    try:
        lines = file.read_bytes().decode().splitlines(keepends=True) if file.exists() else []
    except UnicodeDecodeError as error:
        raise InputError(f"{file} must be UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} line {number} must be JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{file} line {number} must hold metrics and a whole number `step`, got {line.strip()[:80]!r}")
        found.append((line, row))
    return found


class RolloutWriter(AbstractContextManager["RolloutWriter"]):
    """Writes each step's scored answers beside the learner's update, and deletes those that no replay needs.

    An error in writing is raised by the next call, or at the end of the block.
    """

    def __init__(self, run: Run) -> None:
        self._folder, self._kept_from = run.path, run.first_step
        self._pool = ThreadPoolExecutor(1, "rollout-writer")
        self._pending: Future[None] | None = None

    def write(self, step: int, scored: Sequence[Scored]) -> None:
        """Begin to write a step's answers."""
        self.wait()
        self._pending = self._pool.submit(write_rollout, scored, rollout_path(self._folder, step))

    def wait(self) -> None:
        """Return when everything is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def forget(self, checkpoint: int) -> None:
        """Step `checkpoint` was saved: delete the rollouts before the previous checkpoint."""
        forget_rollouts(self._folder, before=self._kept_from)
        self._kept_from = checkpoint

    def __exit__(self, kind: object, *error: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


class StopRequest:
    """Catches SIGTERM from now on, so that the step can be completed and saved."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class MemoryMonitor:
    """Peak proportional memory (PSS, bytes) of this process and everything it started, sampled every few seconds."""

    def __init__(self, interval_s: float = 5.0) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-monitor", daemon=True)

    def __enter__(self) -> MemoryMonitor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own, ended = psutil.Process(), False
        while not ended:
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, [own, *own.children(recursive=True)])))
            ended = self._done.wait(self._interval_s)


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended meanwhile
        return 0
