"""Policies tuned on reward models of several methods, for both kinds of users, over seeds: the value of a better reward model.

for users, seed:    one log, one fit of all methods
    for method:     the starting policy, tuned on that method's model --> oracle reward on held-out topics
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from actors.cluster.runtime import ray_cluster
from actors.system import start_roles
from causalrm_ray.checkpoint import atomic_folder, verify_folder
from causalrm_ray.config.options import dump_config, validate
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.report.benchmark_figures import draw_comparison
from jobs.lab.tables import show, summarize, with_spread, write_csv, write_markdown
from jobs.support.feedback import simulate_feedback
from jobs.support.oracle import Oracle
from jobs.support.progress import Progress
from jobs.support.prompts import Models, PromptSource, describe_adapters, find_models
from jobs.support.run_folder import Run
from jobs.train_policy import policy_step

METHODS = ("naive", "causalrm_dr", "auto", "oracle")
USERS = ("protocol", "strong_feelings")
SEEDS = 3
FIGURES = {"oracle_reward": "oracle reward", "flashy": "share flashy", "r2": "reward model R2", "auroc": "AUROC"}  # headings
COLUMNS = ["users", "seed", "method", *FIGURES]


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
    rows = read_results(results)
    done = set(zip(rows["users"], rows["seed"], strict=True))
    with Progress() as progress:
        models = find_models(config, progress.pretraining)
        describe_adapters(config, models)  # refuses what the learner would, of the first cell
        for users, seed in itertools.product(USERS, range(config.run.seed, config.run.seed + SEEDS)):
            if (users, seed) not in done:
                progress.phase(f"{users} users, seed {seed}")
                cell = compare_methods(for_world(config, users, seed), models, progress)
                found = pd.DataFrame([{"users": users, "seed": seed, **row} for row in cell], columns=COLUMNS)
                rows = found if rows.empty else pd.concat([rows, found], ignore_index=True)
                write_csv(rows, results)
    table = tabulate(rows)
    texts = table_texts(table)
    write_markdown(texts, folder / "table.md")
    draw_comparison(table, folder / "comparison.png")
    show(texts, folder)
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
    shutil.rmtree(config.run.path, ignore_errors=True)  # left by an interrupted comparison
    run = Run(config)
    task, truth = PromptSource(config, models), Oracle(config)
    with ray_cluster(config.cluster, config.run.cache):
        roles = start_roles(config, models.policy, models.reward)
        simulate_feedback(config, task, roles)
        fit = roles.refitter.refit("log", task.as_of(0), METHODS, truth.preferences)
        roles.refitter.end_fits()
        start = run.path / "start"
        with atomic_folder(start) as folder:
            serving = roles.save(folder)
        fresh = [done for done in roles.stream.sample(task.evaluation_requests()) if not done.is_blank]
        for method in METHODS:
            serving["reward"]["folder"] = fit.folders[method]
            verify_folder(start)
            roles.load(start, serving)
            judged = truth.judge(roles.score(fresh), task.impressions(fresh, task.clock(0)))
            for step in progress.steps(0, config.loop.steps):
                progress.step(step, policy_step(task, truth, roles, step, shown=False))
            answers = roles.stream.sample(task.evaluation_requests())
            yield {
                "method": method,
                "oracle_reward": float(truth.scores(answers).mean()),
                "flashy": truth.flashy(answers),
                **judged,
            }


def read_results(path: Path) -> pd.DataFrame:
    """Rows of results.csv; none where it does not exist yet."""
    return pd.read_csv(path, float_precision="round_trip") if path.exists() else pd.DataFrame(columns=COLUMNS)


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and its standard error (`_se`), per kind of users and method; undefined figures are left out."""
    return summarize(rows, ["users", "method"], list(FIGURES), "se")


def table_texts(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of table.md, mean ± standard error over seeds."""
    return pd.DataFrame({"users": table["users"], "method": table["method"]}).assign(
        **{heading: with_spread(table, name, "se") for name, heading in FIGURES.items()}
    )
