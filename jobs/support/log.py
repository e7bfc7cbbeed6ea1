"""A run's log: `log.jsonl`, a line of JSON for every phase, step, sync, refit, gate decision, warning and failure.

{"time": ISO 8601 UTC, "level": "info", "run": NAME, "step": 3 or null, "role": "learner", "event": "sync", "fields": {...}}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cluster.telemetry import LOGGER, event, run_name, step_now
from causalrm_ray.config.base import RunFolder
from causalrm_ray.errors import ConfigError, InputError

FILE = "log.jsonl"
SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")  # names of environment variables
USER_INFO = re.compile(r"""://[^\s"']+@""")  # of a URL


def without_secrets(text: str) -> str:
    """`text` with the user part of URLs and the values of secret environment variables masked."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return USER_INFO.sub("://***@", text)


def mask_secrets(tree: Any) -> Any:
    """Data that JSON can hold with every text in it masked, before JSON escapes what would then no longer be found."""
    if isinstance(tree, Mapping):
        return {name: mask_secrets(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [mask_secrets(value) for value in tree]
    return tree if tree is None or isinstance(tree, bool | int | float) else without_secrets(str(tree))


def warn(text: str) -> None:
    """Print and log a warning, without secrets."""
    event("warning", level=logging.WARNING, text=text)
    Console(stderr=True).print(without_secrets(text), style="yellow", highlight=False, markup=False, soft_wrap=True)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, without secrets."""

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
        return json.dumps(mask_secrets(line))


class _LazyFile(logging.FileHandler):
    """A file that is created, with its folder, for the first line."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


@contextlib.contextmanager
def run_log(run: RunFolder) -> Iterator[None]:
    """While the block lasts, append events to `log.jsonl` of the run, among them an error that ends it.

    ConfigError and InputError before the first event leave no file.
    """
    handler, logger = _LazyFile(run.path / FILE, encoding="utf-8", delay=True), logging.getLogger(LOGGER)
    handler.setFormatter(JsonFormatter())
    name, step, level, propagate = run_name.set(run.name), step_now.set(None), logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        if handler.stream is not None or not isinstance(error, ConfigError | InputError):
            event("failure", level=logging.ERROR, kind=type(error).__name__, error=str(error))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
        run_name.reset(name)
        step_now.reset(step)
