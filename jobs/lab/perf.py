"""Speed of every part of a step, relative to the same work done without this system; the two sides alternate within one run.

rollout  our streamed tokens/s over raw vLLM's               sync    a whole publish against a plain copy of its bytes
learner  our update's speed over a plain torch loop's        driver  share of a step in which no role works
trl      a whole step's speed over TRL's GRPOTrainer         memory  growth of the driver over many steps
asynchronous  speed of steps whose answers are generated during the step before, over that of sequential steps

Other work on the machine affects the figures; its load is recorded with each. No test judges them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from actors.cluster.runtime import ray_cluster
from actors.lab.perf_trl import check_trl
from causalrm_ray.checkpoint import write_json
from causalrm_ray.config.options import dump_config
from causalrm_ray.config.perf import PerfConfig
from causalrm_ray.errors import InputError
from causalrm_ray.report.speed import Figure, draw_figures
from jobs.lab.perf_bench import Bench
from jobs.lab.perf_parts import MEASURES
from jobs.lab.tables import show, write_markdown
from jobs.support.progress import Progress


def run(config: PerfConfig) -> int:
    """Run the job."""
    folder = config.run.path
    if (folder / "perf.json").exists():
        raise InputError(f"{folder} holds figures already: remove it, or choose another run.name")
    if "trl" in config.parts:
        check_trl()
    dump_config(config, folder / "config.yaml")
    figures: list[Figure] = []
    rows: list[dict[str, Any]] = []
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        for number, case in enumerate(config.cases):
            bench = Bench(config, case, progress)
            for part in config.parts:
                if part != "memory" or number == 0:
                    progress.phase(f"{part}, {bench.name}, load {os.getloadavg()[0]:.1f}")
                    figures.append(MEASURES[part](bench))
                    rows.append({**asdict(figures[-1]), "met": figures[-1].met, "load": os.getloadavg()[0]})
                    write_json(folder / "perf.json", {"cores": os.cpu_count(), "figures": rows})
    _conclude(figures, folder)
    return 0


def _conclude(figures: Sequence[Figure], folder: Path) -> None:
    """The table, printed and as Markdown, and the picture."""
    table = pd.DataFrame(
        [
            {
                "figure": found.name,
                "case": found.case,
                "median": f"{found.value:.3g}",
                "least": f"{found.low:.3g}",
                "largest": f"{found.high:.3g}",
                "n": found.count,
                "target": f"{'>=' if found.at_least else '<='} {found.target:g}",
                "met": "yes" if found.met else "no",
                "details": ", ".join(f"{name} {value:.3g}" for name, value in found.details.items()),
            }
            for found in figures
        ]
    )
    write_markdown(table, folder / "table.md", "medians of ratios, with the least and the largest")
    draw_figures(figures, folder / "perf.png")
    show(table.drop(columns="details"), folder)
