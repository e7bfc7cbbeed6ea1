"""Can noise rates and their intervals be believed? Both estimated on many simulated logs of which the truth is known.

world x rows x true rates --> simulations, one Ray task each --> noise.csv, noise.md
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import run_tasks
from actors.lab.benchmark_tasks import NoiseSpec, Row, run_noise
from causalrm_ray.config.benchmark import NoiseStudyConfig
from causalrm_ray.config.options import dump_config
from causalrm_ray.errors import InputError
from causalrm_ray.types import NoiseRates
from jobs.lab.benchmark import write_markdown, write_rows
from jobs.support.progress import Progress

PAIRS = ("bias", "mean_error", "max_error", "coverage", "width")  # of rho_01 and of rho_10
TRUTH = ("setting", "rows", "rho_01", "rho_10")
COLUMNS = (*TRUTH, *(f"{name}_{rate}" for name in PAIRS for rate in ("01", "10")), "warned", "failed")


def run(config: NoiseStudyConfig) -> int:
    """Run the job."""
    folder = config.run.path
    if (folder / "noise.csv").exists():
        raise InputError(f"{folder} holds a study already: remove it, or choose another run.name")
    dump_config(config, folder / "config.yaml")
    kinds = itertools.product(config.settings, config.rows, config.rho)
    orders = {order.name: order for order in (NoiseSpec(setting, rows, NoiseRates(*rho)) for setting, rows, rho in kinds)}
    found: dict[str, Row] = {}
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        progress.tasks("studies", len(orders))
        told = (config.simulations, config.draws)
        for count, (name, result) in enumerate(run_tasks(run_noise, orders, told, "studies", config.cluster.timeout_s), 1):
            found[name] = result
            progress.task(count, name)
    rows = [_row(order, found[name]) for name, order in orders.items()]
    write_rows(folder / "noise.csv", COLUMNS, rows)
    _show(rows, config, folder / "noise.md")
    return 0


def _row(order: NoiseSpec, result: Row) -> Row:
    pairs = {f"{name}_{rate}": value for name in PAIRS for rate, value in zip(("01", "10"), result[name], strict=True)}
    told = {"warned": result["warned"], "failed": result["failed"]}
    return {"setting": order.setting, "rows": order.rows, **asdict(order.rates), **pairs, **told}


def _show(rows: list[Row], config: NoiseStudyConfig, path: Path) -> None:
    """Write the table as Markdown, and print it."""
    lines = [[f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS] for row in rows]
    title = f"{config.simulations} simulated logs a line: errors of the rates, share of 95 % intervals that hold the truth, width"
    write_markdown(title, COLUMNS, lines, path)
    printed = (*TRUTH, "mean_error_01", "mean_error_10", "coverage_01", "coverage_10", "warned")
    table = Table(*printed, box=None)
    for line in lines:
        table.add_row(*(text for name, text in zip(COLUMNS, line, strict=True) if name in printed))
    Console().print(table)
    Console().print(f"see {path.parent}", markup=False, highlight=False)
