"""Every method on one graded data set whose feedback is simulated: the accuracy of each, by setting.

alpha x noise rates x selection x seed --> cells, one Ray task each --> cells/*.json --> results.csv --> table.md, figures
alpha x noise rates x selection        --> biases of the estimators --> bias/*.json  --> bias.csv    --> bias.md

Noise rates are those of the paper's scenarios, and further pairs. Selection that does not read alpha has one setting for all of
them, whose alpha is empty in the tables.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import run_tasks
from actors.lab.benchmark_tasks import METRICS, CellSpec, Setting, run_bias, run_cell
from causalrm_ray.checkpoint import read_json, write_json
from causalrm_ray.checks import check_both_classes
from causalrm_ray.config.benchmark import BenchmarkConfig
from causalrm_ray.config.options import dump_config, load_tree
from causalrm_ray.data.embeddings import load_pair
from causalrm_ray.data.simulate import WITHOUT_ALPHA, preferences, threshold
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.estimators.core.task import load_method
from causalrm_ray.estimators.pipeline import ORACLE, check_head
from causalrm_ray.estimators.studies.semisynthetic import Bias
from causalrm_ray.registry import ESTIMATORS
from causalrm_ray.report.benchmark_figures import ablation_lines, draw_bars, draw_rho_sensitivity, draw_sensitivity
from causalrm_ray.types import NoiseRates
from jobs.lab.tables import show, summarize, with_spread, write_csv, write_markdown
from jobs.support.progress import Progress

SETTING = ["alpha", "scenario", "selection"]
FIGURES = [*METRICS, "rho_01_hat", "rho_10_hat", "fit_s"]
RATES = ["rho_01", "rho_10"]  # the true ones
FIXED = ("train", "test", "head", "feedback_rate", "strata")  # options that cells depend on and are not named by
COLUMNS = ["dataset", *SETTING, "method", "seed", *FIGURES, *RATES]
BIAS_COLUMNS = ["dataset", *SETTING, *(field.name for field in fields(Bias))]
Spec = TypeVar("Spec", CellSpec, Setting)


def run(config: BenchmarkConfig) -> int:
    """Run the job. `resume=true` continues an earlier one; it may ask for more methods, seeds or settings than at its start."""
    methods = wanted_methods(config)
    data = load_pair(config.train, config.test)
    above = threshold(data[0].levels)
    check_both_classes(f"{config.test}: labels above {above:g}, the train split's median,", preferences(data[1].levels, above))
    folder = config.run.path
    _begin(config, folder)
    to_fit, biases = list(_cells_to_fit(config, methods)), list(_biases_to_measure(config))
    with Progress() as progress, contextlib.ExitStack() as stack:
        if to_fit or biases:
            stack.enter_context(ray_cluster(config.cluster, config.run.cache))
        for spec, found in _each(progress, "biases", run_bias, biases, (data[0], config.bias_draws), config):
            write_json(_file(folder, spec), [asdict(bias) for bias in found])
        for spec, found in _each(progress, "cells", run_cell, to_fit, data, config):
            write_json(_file(folder, spec), [*_read(folder, spec), *(asdict(result) for result in found)])
            write_csv(read_cells(config, methods), folder / "results.csv")
            for result in found:
                if result.fault:
                    progress.phase(f"  {spec.name}: {result.method} failed: {result.fault}")
    _conclude(config, methods, folder)
    return 0


def _each(
    progress: Progress, what: str, task: Callable[..., list[Any]], specs: Sequence[Spec], shared: Any, config: BenchmarkConfig
) -> Iterator[tuple[Spec, list[Any]]]:
    """(spec, results) as each task ends; Ray must be up if there are specs."""
    if not specs:
        return
    by_name = {spec.name: spec for spec in specs}
    progress.tasks(what, len(specs))
    for count, (name, found) in enumerate(run_tasks(task, by_name, shared, what, config.cluster.timeout_s), 1):
        yield by_name[name], found
        progress.task(count, name)


def _conclude(config: BenchmarkConfig, methods: Sequence[str], folder: Path) -> None:
    """Tables and pictures of all results so far."""
    rows = read_cells(config, methods)
    write_csv(rows, folder / "results.csv")
    table = tabulate(rows)
    texts = table_texts(table)
    given = f"feedback rate {config.feedback_rate:g}{', strata given' if config.strata else ''}"
    write_markdown(texts, folder / "table.md", f"mean ± standard deviation over seeds; {given}")
    _draw(config, table, folder)
    if config.bias_draws:
        biases = read_biases(config)
        write_csv(biases, folder / "bias.csv")
        title = "(estimate - L_ideal) / L_ideal ± standard error over draws, with true nuisances"
        write_markdown(bias_texts(biases), folder / "bias.md", title)
    show(texts[[*SETTING, "method", "r2", "auroc"]], folder)


def _draw(config: BenchmarkConfig, table: pd.DataFrame, folder: Path) -> None:
    """The pictures that the table can fill; noise rates besides the scenarios have a picture of their own."""
    scenarios = table[table["scenario"].isin(config.scenarios)]
    scenarios = table if scenarios.empty else scenarios
    ablation = ablation_lines(scenarios)
    for alpha in dict.fromkeys(setting.labels["alpha"] for setting in settings(config)):
        part = f"alpha-{alpha!r}" if alpha else "no-alpha"
        for name, lines in (("bars", scenarios), ("ablation", ablation)):
            if not lines.empty:
                draw_bars(lines[lines["alpha"] == alpha], folder / f"{name}-{part}.png")
    with_alpha = scenarios[scenarios["alpha"] != ""]
    if len(config.alpha) > 1 and not with_alpha.empty:
        draw_sensitivity(with_alpha.astype({"alpha": float}), folder / "sensitivity.png")
    if config.rho:
        draw_rho_sensitivity(table, folder / "sensitivity-rho.png")


def settings(config: BenchmarkConfig) -> list[Setting]:
    """All settings, in the order of the tables."""
    rates = [*config.scenarios, *(NoiseRates(*pair) for pair in config.rho)]
    found = (
        Setting(None if selection in WITHOUT_ALPHA else alpha, noise, selection, config.feedback_rate)
        for alpha, noise, selection in itertools.product(config.alpha, rates, config.selection)
    )
    return list(dict.fromkeys(found))


def cells(config: BenchmarkConfig, methods: Sequence[str]) -> list[CellSpec]:
    """All cells, in the order of the tables."""
    kinds = itertools.product(settings(config), config.seeds)
    return [CellSpec(setting, seed, tuple(methods), config.head, config.strata) for setting, seed in kinds]


def read_cells(config: BenchmarkConfig, methods: Sequence[str]) -> pd.DataFrame:
    """The rows of results.csv so far: by setting, then in the order of `methods`, then by seed."""
    found = [
        (number // len(config.seeds), methods.index(row["method"]), {**_labels(config, spec.setting), "seed": spec.seed, **row})
        for number, spec in enumerate(cells(config, methods))
        for row in _read(config.run.path, spec)
        if row["method"] in methods
    ]
    return pd.DataFrame([row for *_, row in sorted(found, key=lambda entry: entry[:2])], columns=COLUMNS)


def read_biases(config: BenchmarkConfig) -> pd.DataFrame:
    """The rows of bias.csv so far, by setting."""
    rows = [{**_labels(config, setting), **row} for setting in settings(config) for row in _read(config.run.path, setting)]
    return pd.DataFrame(rows, columns=BIAS_COLUMNS)


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per setting and method: of each figure the mean over seeds and its standard deviation (`_sd`), or NaN.

    `seeds` counts the seeds, `fitted` those with metrics.
    """
    by = ["dataset", *SETTING, *RATES, "method"]
    counts = rows.groupby(by, sort=False)["r2"].agg(seeds="size", fitted="count")
    return summarize(rows, by, FIGURES, "sd").join(counts.reset_index(drop=True))


def table_texts(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of table.md."""
    figures = {name: with_spread(table, name, "sd", digits=1 if name == "fit_s" else 3) for name in FIGURES}
    fitted = [f"{fitted} of {seeds}" for fitted, seeds in zip(table["fitted"], table["seeds"], strict=True)]
    return table[[*SETTING, "method"]].assign(**figures, fitted=fitted)


def bias_texts(biases: pd.DataFrame) -> pd.DataFrame:
    """The lines of bias.md: relative differences of estimates from L_ideal, a column per kind of prediction."""
    texts = [f"{mean:+.1%} ± {stderr:.1%}" for mean, stderr in zip(biases["relative"], biases["stderr"], strict=True)]
    index = [*SETTING, "estimator"]
    return biases.assign(text=texts).pivot_table("text", index, "prediction", aggfunc="".join, sort=False).reset_index()


def wanted_methods(config: BenchmarkConfig) -> tuple[str, ...]:
    """The methods to fit. Raises ConfigError for one that is unknown, cannot be imported, or has no head of this kind."""
    try:
        for name in config.methods:
            if name != ORACLE:
                load_method(name)
    except ValueError as error:
        raise ConfigError(f"methods: {error}") from error
    methods = config.methods or (*ESTIMATORS.names(), ORACLE)
    try:
        check_head(config.head.kind, methods)
    except ValueError as error:
        raise ConfigError(f"head.kind: {error}") from error
    return methods


def _begin(config: BenchmarkConfig, folder: Path) -> None:
    """Refuse to mix two benchmarks in one folder, and write down this one's options."""
    file = folder / "config.yaml"
    if config.run.resume:
        started = load_tree(BenchmarkConfig, file)
        for name in FIXED:
            was, got = getattr(started, name), getattr(config, name)
            if was != got:
                raise ConfigError(f"{name}: must stay as it was when {folder} began, or its cells mix; was {was}, got {got}")
    elif (folder / "cells").exists() or (folder / "bias").exists():
        raise InputError(f"{folder} holds a benchmark already: continue it with resume=true, or choose another run.name")
    dump_config(config, file)


def _cells_to_fit(config: BenchmarkConfig, methods: Sequence[str]) -> Iterator[CellSpec]:
    for spec in cells(config, methods):
        done = {row["method"] for row in _read(config.run.path, spec)}
        missing = tuple(name for name in methods if name not in done)
        if missing:
            yield replace(spec, methods=missing)


def _biases_to_measure(config: BenchmarkConfig) -> Iterator[Setting]:
    for setting in settings(config):
        if config.bias_draws not in {0, *(row["draws"] for row in _read(config.run.path, setting))}:
            yield setting


def _read(folder: Path, spec: CellSpec | Setting) -> list[dict[str, Any]]:
    path = _file(folder, spec)
    return read_json(path) if path.exists() else []


def _file(folder: Path, spec: CellSpec | Setting) -> Path:
    return folder / ("cells" if isinstance(spec, CellSpec) else "bias") / f"{spec.name}.json"


def _labels(config: BenchmarkConfig, setting: Setting) -> dict[str, Any]:
    return {"dataset": config.train.stem.removesuffix("_train"), **setting.labels}
