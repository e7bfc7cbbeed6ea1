"""What a run records is what a Prometheus would read off the cluster, and what the dashboard asks for."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from actors.cluster.telemetry import METRICS, exported, record, run_name

TIMEOUT_S = 90.0  # Ray hands metrics on every ten seconds
DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"


def scrape() -> str:
    """The page of the node's exporter, in Prometheus' text format."""
    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        return page.read().decode()


def scraped(names: set[str]) -> str:
    """The page, once it has all of these metrics."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        page = scrape()
        missing = {name for name in names if f"\n{name}{{" not in page}
        if not missing:
            return page
        assert time.monotonic() < deadline, f"never exported: {sorted(missing)}"
        threading.Event().wait(0.5)


@pytest.mark.usefixtures("ray_cluster")
def test_every_metric_reaches_the_exporter_with_its_run_and_role() -> None:
    token = run_name.set("a-run")
    for name in METRICS:
        record(name, "learner-0", 2.0)
        record(name, "learner-0", 3.0)
    record("feedback_rows", "learner-0", 0.0)  # a step whose answers nobody sees
    run_name.reset(token)
    page = scraped(set().union(*map(exported, METRICS)))

    def value(name: str) -> float:
        lines = [line for line in page.splitlines() if line.startswith(f"{name}{{") and 'run="a-run"' in line]
        assert [re.search(r'role="([^"]+)"', line).group(1) for line in lines] == ["learner-0"]
        return float(lines[0].rsplit(" ", 1)[1])

    assert value("ray_causalrm_scored_rows_total") == 5.0
    assert value("ray_causalrm_version") == 3.0
    assert value("ray_causalrm_update_seconds_count") == 2.0
    assert (
        2 * 1.0 <= value("ray_causalrm_update_seconds_sum") <= 2 * 3.0
    )  # Ray keeps the bins only: both were in that of 1 to 3 s
    asked = set(re.findall(r"ray_causalrm_\w+", DASHBOARD.read_text(encoding="utf-8")))
    assert asked
    assert all(f"\n{name}{{" in page for name in asked)
