"""A run's log: `log.jsonl`, a line of JSON for every phase, step, sync, refit, gate decision, warning and failure.

{"time": ISO 8601 UTC, "level": "info", "run": NAME, "step": 3 or null, "role": "learner", "event": "sync", "fields": {...}}
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from actors.cluster.telemetry import LOGGER, event, run_name, step_now
from causalrm_ray.config.base import RunFolder
from causalrm_ray.errors import ConfigError, InputError

FILE = "log.jsonl"


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run": run_name.get(),
            "step": step_now.get(),
            "role": getattr(record, "role", "driver"),
            "event": record.getMessage(),
            "fields": getattr(record, "fields", {}),
        }
        return json.dumps(line, default=str)


class _File(logging.FileHandler):
    """A file that is opened, and its folder made, for the first line."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


class RunLog:
    """While the block lasts, events go to `log.jsonl` of the run; an error that ends it is one of them.

    A run that goes on appends. What the command line refuses (ConfigError, InputError) before anything happened leaves no file.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._handler = _File(run.path / FILE, encoding="utf-8", delay=True)
        self._handler.setFormatter(JsonLines())

    def __enter__(self) -> RunLog:
        self._token, self._step = run_name.set(self._run.name), step_now.set(None)
        logger = logging.getLogger(LOGGER)
        self._level, self._passes_on = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self._handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and (self._handler.stream is not None or not isinstance(error, ConfigError | InputError)):
            event("failure", level=logging.ERROR, kind=type(error).__name__, error=str(error))
        logger = logging.getLogger(LOGGER)
        logger.removeHandler(self._handler)
        self._handler.close()
        logger.setLevel(self._level)
        logger.propagate = self._passes_on
        run_name.reset(self._token)
        step_now.reset(self._step)
