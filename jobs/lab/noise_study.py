"""Accuracy of estimated noise rates and coverage of their intervals, on many simulated logs whose truth is known.

world x rows x true rates --> simulations, one Ray task each --> noise.csv, noise.md
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import pandas as pd

from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import run_tasks
from actors.lab.benchmark_tasks import NoiseSpec, run_noise
from causalrm_ray.config.benchmark import NoiseStudyConfig
from causalrm_ray.config.options import dump_config
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.studies.noise_study import StudyResult
from causalrm_ray.types import NoiseRates
from jobs.lab.tables import show, write_csv, write_markdown
from jobs.support.progress import Progress

PAIRS = ("bias", "mean_error", "max_error", "coverage", "width")  # of rho_01 and of rho_10
TRUTH = ["setting", "rows", "rho_01", "rho_10"]
PRINTED = [*TRUTH, "mean_error_01", "mean_error_10", "coverage_01", "coverage_10", "warned"]


def run(config: NoiseStudyConfig) -> int:
    """Run the job."""
    folder = config.run.path
    if (folder / "noise.csv").exists():
        raise InputError(f"{folder} holds a study already: remove it, or choose another run.name")
    dump_config(config, folder / "config.yaml")
    kinds = itertools.product(config.settings, config.rows, config.rho)
    specs = {spec.name: spec for spec in (NoiseSpec(world, rows, NoiseRates(*rho)) for world, rows, rho in kinds)}
    found: dict[str, StudyResult] = {}
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        progress.tasks("studies", len(specs))
        repetitions = (config.simulations, config.draws)
        for name, result in run_tasks(run_noise, specs, repetitions, "studies", config.cluster.timeout_s):
            found[name] = result
            progress.task(len(found), name)
    table = pd.DataFrame([_row(spec, found[name]) for name, spec in specs.items()])
    write_csv(table, folder / "noise.csv")
    texts = table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))
    title = f"{config.simulations} simulated logs a line: errors of the rates, share of 95 % intervals that hold the truth, width"
    write_markdown(texts, folder / "noise.md", title)
    show(texts[PRINTED], folder)
    return 0


def _row(spec: NoiseSpec, result: StudyResult) -> dict[str, Any]:
    pairs = {f"{name}_{rate}": value for name in PAIRS for rate, value in zip(("01", "10"), getattr(result, name), strict=True)}
    figures = {**pairs, "warned": result.warned, "failed": result.failed}
    return {"setting": spec.world, "rows": spec.rows, **asdict(spec.rates), **figures}
