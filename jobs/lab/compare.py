"""Policies tuned on reward models of several methods, for both kinds of users, over seeds: what a better reward model is worth.

for users, seed:    one log, one fit of all methods
    for method:     the starting policy, tuned on that method's model --> oracle reward on held-out topics
"""

from __future__ import annotations

import csv
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.cluster.runtime import ray_cluster
from actors.system import start_roles
from causalrm_ray.checkpoint import atomic_folder, verify_folder
from causalrm_ray.config.options import dump_config, validate
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.files import write_whole
from causalrm_ray.report.page import draw_comparison
from jobs.support.feedback import simulate_feedback
from jobs.support.oracle import Oracle
from jobs.support.progress import Progress
from jobs.support.prompts import Models, Task, find_models
from jobs.support.run_folder import Run
from jobs.train_policy import policy_step

METHODS = ("naive", "causalrm_dr", "auto", "oracle")
USERS = ("protocol", "strong_feelings")
SEEDS = 3
Row = Mapping[str, Any]
FIELDS = ("users", "seed", "method", "oracle_reward", "flashy", "r2", "auroc")


def run(config: Config) -> int:
    """Run the job; results.csv, table.md and comparison.png are in runs/<name>. `resume=true` goes on where one stopped."""
    if not config.has_truth:
        raise ConfigError(
            "compare measures against the embedded oracle: feedback.source and feedback.prompts must be as by default"
        )
    folder = config.run.path
    results = folder / "results.csv"
    if results.exists() and not config.run.resume:
        raise InputError(f"{folder} holds a comparison already: continue it with resume=true, or choose another run.name")
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(config, folder / "config.yaml")
    rows: list[Row] = read_results(results)
    done = {(row["users"], int(row["seed"])) for row in rows}
    with Progress() as progress:
        models = find_models(config, progress.pretraining)
        for users in USERS:
            for seed in range(config.run.seed, config.run.seed + SEEDS):
                if (users, seed) not in done:
                    progress.phase(f"{users} users, seed {seed}")
                    cell = compare_methods(for_world(config, users, seed), models, progress)
                    rows += [{"users": users, "seed": seed, **row} for row in cell]
                    write_results(results, rows)
    table = tabulate(rows)
    write_table(table, folder / "table.md")
    draw_comparison(table, folder / "comparison.png")
    return 0


def for_world(config: Config, users: str, seed: int) -> Config:
    """The configuration of one cell's run, in a folder of its own."""
    tree = config.model_dump(mode="json")
    tree["world"]["users"] = users
    tree["run"] |= {"seed": seed, "name": f"{users}-{seed}", "dir": str(config.run.path), "resume": False}
    tree["feedback"]["url"] = None
    tree["reward"]["method"], tree["reward"]["compare"] = METHODS[0], METHODS[1:]
    return validate(tree)


def compare_methods(config: Config, models: Models, progress: Progress) -> Iterator[dict[str, Any]]:
    """One log, one fit, and a policy tuned from the start on each method's model."""
    shutil.rmtree(config.run.path, ignore_errors=True)  # what an interrupted comparison left of this cell
    run = Run(config)
    task, truth = Task(config, models), Oracle(config)
    with ray_cluster(config.cluster, config.run.cache):
        roles = start_roles(config, models.policy, models.reward)
        simulate_feedback(config, task, roles)
        fit = roles.refitter.refit("log", task.as_of(0), METHODS, truth.preferences)
        roles.refitter.end_fits()
        start = run.path / "start"
        with atomic_folder(start) as folder:
            serving = roles.save(folder)
        fresh = [done for done in roles.sample(task.evaluation_requests()) if done.response]
        for method in METHODS:
            serving["reward"]["folder"] = fit["reward"]["folders"][method]
            verify_folder(start)
            roles.load(start, serving)
            judged = truth.judge(roles.score(fresh), task.impressions(fresh, task.clock(0)))
            for step in progress.steps(0, config.loop.steps):
                progress.step(step, policy_step(task, truth, roles, step, shown=False))
            answers = roles.sample(task.evaluation_requests())
            yield {
                "method": method,
                "oracle_reward": float(truth.scores(answers).mean()),
                "flashy": truth.flashy(answers),
                **judged,
            }


def read_results(path: Path) -> list[Row]:
    """Rows of results.csv; none where it does not exist yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write results.csv: whole or not at all."""

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)


def tabulate(rows: Sequence[Row]) -> list[dict[str, float | str]]:
    """Mean over seeds and its standard error, per kind of users and method."""
    table = []
    for users in USERS:
        for method in METHODS:
            cells = [row for row in rows if (row["users"], row["method"]) == (users, method)]
            line: dict[str, float | str] = {"users": users, "method": method}
            for name in FIELDS[3:]:
                values = [float(cell[name]) for cell in cells if cell[name] not in ("", None)]  # undefined where all r* are alike
                line |= {name: statistics.fmean(values), f"{name}_se": statistics.stdev(values) / len(values) ** 0.5}
            table.append(line)
    return table


def write_table(table: Sequence[Mapping[str, float | str]], path: Path) -> None:
    """Print the table and write it as Markdown."""
    names = ("users", "method", "oracle reward", "share flashy", "reward model R2", "AUROC")
    shown = Table(*names, box=None)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in table:
        cells = [str(row["users"]), str(row["method"])] + [f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in FIELDS[3:]]
        shown.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Console(width=max(100, Console().width)).print(shown)
