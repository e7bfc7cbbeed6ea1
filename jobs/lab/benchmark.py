"""Every method on one graded data set whose feedback is simulated: how near each comes to the truth, setting by setting.

alpha x slips x selection x seed --> cells, one Ray task each --> cells/*.json --> results.csv --> table.md, figures
alpha x slips x selection        --> biases of the estimators --> bias/*.json  --> bias.csv    --> bias.md

LabelNoise are scenarios, and pairs of rates besides.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import run_tasks
from actors.lab.benchmark_tasks import METRICS, BiasSpec, Cell, CellSpec, Row, Setting, run_bias, run_cell
from causalrm_ray.checkpoint import read_json, write_json
from causalrm_ray.checks import check_both_classes
from causalrm_ray.config.benchmark import BenchmarkConfig
from causalrm_ray.config.options import dump_config, load_tree
from causalrm_ray.data.embeddings import GradedEmbeddings, load_pair
from causalrm_ray.data.simulate import preferences, threshold
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.estimators.core.task import load_method
from causalrm_ray.estimators.pipeline import ORACLE
from causalrm_ray.estimators.studies.semisynthetic import Bias
from causalrm_ray.files import write_whole
from causalrm_ray.registry import ESTIMATORS
from causalrm_ray.report.benchmark_figures import ablation_lines, draw_bars, draw_rho_sensitivity, draw_sensitivity
from causalrm_ray.types import NoiseRates
from jobs.support.progress import Progress

SETTING = ("alpha", "scenario", "selection")
FIGURES = (*METRICS, "rho_01_hat", "rho_10_hat", "fit_s")
RATES = ("rho_01", "rho_10")  # the true ones
FIELDS = ("dataset", *SETTING, "method", "seed", *FIGURES, *RATES)
BIAS_FIELDS = ("dataset", *SETTING, *(field.name for field in fields(Bias)))


def run(config: BenchmarkConfig) -> int:
    """Run the job. `resume=true` goes on where one stopped; it may ask for more methods, seeds or settings than at its start."""
    methods = wanted_methods(config)
    data = load_pair(config.train, config.test)
    _check_classes(config, data)
    folder = config.run.path
    _begin(config, folder)
    cell_orders = {order.cell.name: order for order in _cell_orders(config, methods)}
    bias_orders = {order.setting.name: order for order in _bias_orders(config)}
    with Progress() as progress, contextlib.ExitStack() as stack:
        if cell_orders or bias_orders:
            stack.enter_context(ray_cluster(config.cluster, config.run.cache))
        for name, found in _each(progress, "biases", run_bias, bias_orders, data, config):
            write_json(_file(folder, "bias", name), found)
        for name, found in _each(progress, "cells", run_cell, cell_orders, data, config):
            write_json(_file(folder, "cells", name), [*_read(folder, "cells", name), *found])
            write_rows(folder / "results.csv", FIELDS, read_cells(config, methods))
    _conclude(config, methods, folder)
    return 0


def _each(
    progress: Progress,
    what: str,
    task: Callable[..., list[Row]],
    orders: Mapping[str, CellSpec | BiasSpec],
    data: tuple[GradedEmbeddings, GradedEmbeddings],
    config: BenchmarkConfig,
) -> Iterator[tuple[str, list[Row]]]:
    """(name, rows) of each order as its task ends; Ray must be up where there is an order."""
    if not orders:
        return
    progress.tasks(what, len(orders))
    for count, (name, rows) in enumerate(run_tasks(task, orders, data, what, config.cluster.timeout_s), 1):
        yield name, rows
        for row in rows:
            if row.get("fault"):
                progress.phase(f"  {name}: {row['method']} failed: {row['fault']}")
        progress.task(count, name)


def _conclude(config: BenchmarkConfig, methods: Sequence[str], folder: Path) -> None:
    """Tables and pictures of all that is there."""
    rows = read_cells(config, methods)
    write_rows(folder / "results.csv", FIELDS, rows)
    table = tabulate(rows)
    write_table(table, folder / "table.md")
    _draw(config, table, folder)
    if config.bias_draws:
        biases = read_biases(config)
        write_rows(folder / "bias.csv", BIAS_FIELDS, biases)
        write_bias_table(biases, folder / "bias.md")
    Console().print(f"see {folder}", markup=False, highlight=False)


def _draw(config: BenchmarkConfig, table: Sequence[Row], folder: Path) -> None:
    """The pictures that the table can fill; those of scenarios leave the other slips to a picture of their own."""
    scenarios = [line for line in table if line["scenario"] in config.scenarios] or table
    ablation = ablation_lines(scenarios)
    for alpha in config.alpha:
        draw_bars([line for line in scenarios if line["alpha"] == alpha], folder / f"bars-alpha-{alpha!r}.png")
        if ablation:
            draw_bars([line for line in ablation if line["alpha"] == alpha], folder / f"ablation-alpha-{alpha!r}.png")
    if len(config.alpha) > 1:
        draw_sensitivity(scenarios, folder / "sensitivity.png")
    if config.rho:
        draw_rho_sensitivity(table, folder / "sensitivity-rho.png")


def settings(config: BenchmarkConfig) -> list[Setting]:
    """All settings, in the order of the tables."""
    slips = [*config.scenarios, *(NoiseRates(*pair) for pair in config.rho)]
    return [Setting(*values) for values in itertools.product(config.alpha, slips, config.selection)]


def read_cells(config: BenchmarkConfig, methods: Sequence[str]) -> list[Row]:
    """The rows of results.csv that are there already: by setting, then in the order of `methods`, then by seed."""
    rows = []
    for setting in settings(config):
        found = [
            {**_labels(config, setting), "seed": seed, **row}
            for seed in config.seeds
            for row in _read(config.run.path, "cells", Cell(setting, seed).name)
            if row["method"] in methods
        ]
        rows += sorted(found, key=lambda row: methods.index(row["method"]))
    return rows


def read_biases(config: BenchmarkConfig) -> list[Row]:
    """The rows of bias.csv that are there already, by setting."""
    return [
        {**_labels(config, setting), **row}
        for setting in settings(config)
        for row in _read(config.run.path, "bias", setting.name)
    ]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a CSV file of the named `columns`: whole or not at all. What a row does not have is left blank."""

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)


def tabulate(rows: Sequence[Row]) -> list[Row]:
    """A line per setting and method: of each figure the mean over seeds and its standard deviation (`_sd`), or None.

    `seeds` is how many there are, `fitted` how many of them have metrics.
    """
    table = []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((*_setting(row), row["method"]), []).append(row)
    for group in groups.values():
        line: Row = {name: group[0][name] for name in ("dataset", *SETTING, *RATES, "method")}
        line |= {"seeds": len(group), "fitted": sum(row["r2"] is not None for row in group)}
        for name in FIGURES:
            values = [row[name] for row in group if row[name] is not None]
            line[name] = statistics.fmean(values) if values else None
            line[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(line)
    return table


def write_table(table: Sequence[Row], path: Path) -> None:
    """Write the table as Markdown, and print the part that matters most."""
    columns = (*SETTING, "method", *FIGURES, "fitted")
    lines = []
    for row in table:
        texts = [str(row[name]) for name in (*SETTING, "method")] + [_text(row, name) for name in FIGURES]
        lines.append([*texts, f"{row['fitted']} of {row['seeds']}"])
    write_markdown("mean ± standard deviation over seeds", columns, lines, path)
    printed = (*SETTING, "method", "r2", "auroc")
    shown = Table(*printed, box=None)
    for line in lines:
        shown.add_row(*(text for name, text in zip(columns, line, strict=True) if name in printed))
    Console().print(shown)


def write_bias_table(biases: Sequence[Row], path: Path) -> None:
    """Write the relative differences of estimates from L_ideal as Markdown."""
    kinds = list(dict.fromkeys(row["prediction"] for row in biases))
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for row in biases:
        group = groups.setdefault((*map(str, _setting(row)), row["estimator"]), {})
        group[row["prediction"]] = f"{row['relative']:+.1%} ± {row['stderr']:.1%}"
    lines = [[*labels, *(group[kind] for kind in kinds)] for labels, group in groups.items()]
    title = "(estimate - L_ideal) / L_ideal ± standard error over draws, with true nuisances"
    write_markdown(title, (*SETTING, "estimator", *kinds), lines, path)


def write_markdown(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], path: Path) -> None:
    """Write a titled table of Markdown."""
    marked = ["| " + " | ".join(line) + " |" for line in (columns, *lines)]
    path.write_text("\n".join([title, "", marked[0], "|" + "---|" * len(columns), *marked[1:]]) + "\n", encoding="utf-8")


def wanted_methods(config: BenchmarkConfig) -> tuple[str, ...]:
    """The methods to fit; raises ConfigError for a name that is none."""
    for name in config.methods:
        if name != ORACLE:
            try:
                load_method(name)
            except ValueError as error:
                raise ConfigError(f"methods: {error}") from error
    return config.methods or (*ESTIMATORS.names(), ORACLE)


def _check_classes(config: BenchmarkConfig, data: tuple[GradedEmbeddings, GradedEmbeddings]) -> None:
    above = threshold(data[0].levels)
    check_both_classes(f"{config.test}: labels above {above:g}, the train split's median,", preferences(data[1].levels, above))


def _begin(config: BenchmarkConfig, folder: Path) -> None:
    """Refuse to mix two benchmarks in one folder, and note what this one was told."""
    noted = folder / "config.yaml"
    if not config.run.resume and ((folder / "cells").exists() or (folder / "bias").exists()):
        raise InputError(f"{folder} holds a benchmark already: continue it with resume=true, or choose another run.name")
    if config.run.resume:
        started = load_tree(BenchmarkConfig, noted)
        for name in ("train", "test", "head"):
            if getattr(started, name) != getattr(config, name):
                was, got = getattr(started, name), getattr(config, name)
                raise ConfigError(f"{name}: must stay as it was when {folder} began, or its cells mix; was {was}, got {got}")
    dump_config(config, noted)


def _cell_orders(config: BenchmarkConfig, methods: Sequence[str]) -> Iterator[CellSpec]:
    """What is still to be fitted."""
    for setting, seed in itertools.product(settings(config), config.seeds):
        cell = Cell(setting, seed)
        done = {row["method"] for row in _read(config.run.path, "cells", cell.name)}
        missing = tuple(name for name in methods if name not in done)
        if missing:
            yield CellSpec(cell, missing, config.head)


def _bias_orders(config: BenchmarkConfig) -> Iterator[BiasSpec]:
    """The settings whose biases are still to be measured."""
    for setting in settings(config):
        if config.bias_draws not in {0, *(row["draws"] for row in _read(config.run.path, "bias", setting.name))}:
            yield BiasSpec(setting, config.bias_draws)


def _read(folder: Path, kind: str, name: str) -> list[Row]:
    path = _file(folder, kind, name)
    return read_json(path) if path.exists() else []


def _file(folder: Path, kind: str, name: str) -> Path:
    return folder / kind / f"{name}.json"


def _labels(config: BenchmarkConfig, setting: Setting) -> Row:
    return {"dataset": config.train.stem.removesuffix("_train"), **setting.labels}


def _setting(row: Mapping) -> tuple:
    return tuple(row[name] for name in SETTING)


def _text(line: Row, name: str) -> str:
    if line[name] is None:
        return ""
    digits = 1 if name == "fit_s" else 3
    return f"{line[name]:.{digits}f}" + ("" if line[f"{name}_sd"] is None else f" ± {line[f'{name}_sd']:.{digits}f}")
