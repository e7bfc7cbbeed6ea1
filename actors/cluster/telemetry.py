"""Telemetry of a run: metrics for Ray's Prometheus endpoint, and events for the run's own log.

record(name, role, value) -> Ray metric "causalrm_<name>" with the tags run and role     without Ray (in-process): nothing
event(name, role, ...)    -> logger "causalrm_ray"                                       written by jobs/support/log.py

The driver records for every role, since each answer passes through it. One metric object is kept per name and process.
"""

from __future__ import annotations

import functools
import logging
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge, Histogram

DRIVER = "driver"
LOGGER = "causalrm_ray"
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]  # upper ends of the histograms' bins

run_name: ContextVar[str] = ContextVar("run_name", default="")
step_now: ContextVar[int | None] = ContextVar("step_now", default=None)
_log = logging.getLogger(LOGGER)
_log.addHandler(logging.NullHandler())


class Metric(NamedTuple):
    """A counter only grows, a gauge holds its last value, a histogram counts values by size."""

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str


METRICS = {
    "generated_tokens": Metric("counter", "tokens that a generator wrote"),
    "scored_rows": Metric("counter", "answers that the reward model scored"),
    "feedback_rows": Metric("counter", "impressions that went to the feedback log"),
    "queue_rows": Metric("gauge", "answers between generation and the end of scoring, preparing and logging"),
    "update_seconds": Metric("histogram", "seconds of a policy update"),
    "sync_seconds": Metric("histogram", "seconds of a weight sync, the slowest generator's"),
    "fit_seconds": Metric("histogram", "seconds of a fit of the propensity or of the reward models"),
    "version": Metric("gauge", "version of the weights that a role has"),
    "failures": Metric("counter", "times that a role died or did not answer in time"),
}


def record(name: str, role: str, value: float) -> None:
    """Add `value` to a counter, set a gauge to it, or count it in a histogram; `name` is a key of METRICS."""
    kind = METRICS[name].kind
    if not ray.is_initialized():
        return
    metric, tags = _metric(name), {"run": run_name.get(), "role": role}
    if kind == "counter":
        if value:  # Ray refuses to add 0
            metric.inc(value, tags)
    elif kind == "gauge":
        metric.set(value, tags)
    else:
        metric.observe(value, tags)


def event(name: str, /, role: str = DRIVER, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event; `fields` are JSON values."""
    _log.log(level, name, extra={"role": role, "fields": fields})


def exported(name: str) -> set[str]:
    """Names under which Prometheus finds a metric."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[METRICS[name].kind]
    return {f"ray_causalrm_{name}{suffix}" for suffix in suffixes}


@functools.cache
def _metric(name: str) -> Any:
    kind, meaning = METRICS[name]
    arguments: dict[str, Any] = {"name": f"causalrm_{name}", "description": meaning, "tag_keys": ("run", "role")}
    if kind == "histogram":
        return Histogram(boundaries=SECONDS, **arguments)
    return (Counter if kind == "counter" else Gauge)(**arguments)
