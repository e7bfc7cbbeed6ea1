"""Train the learner alone on the rollouts that a run kept, from the checkpoint before them: does it do what it did?

newest checkpoint with rollouts after it --> learner;  its rollouts --> prepare, update --> figures next to metrics.jsonl
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.cluster.runtime import ray_cluster
from actors.system import Roles, start_roles
from causalrm_ray.checkpoint import CheckpointError, verify_folder
from causalrm_ray.config.train import Config
from causalrm_ray.data.rollouts import kept_steps, read_rollout, rollout_path
from causalrm_ray.errors import InputError
from jobs.support.progress import Progress
from jobs.support.prompts import find_models
from jobs.support.run_folder import Run

FIGURES = ("policy_loss", "kl", "entropy", "ratio_mean", "clip_fraction", "grad_norm", "logprob_mismatch_max_abs")
TOLERANCE = 1e-3  # relative: the same sums in another order, through a step of the optimizer or several


def run(config: Config) -> int:
    """Run the job on runs/<run.name>, under the options that it was started with; 1 if a figure differs."""
    folder = config.run.path
    checkpoint, steps = find_rollouts(folder)
    found = {row["step"]: row for row in Run.read_metrics(folder)}
    table, same = Table("step", "figure", "then", "now", box=None), True
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        models = find_models(config)
        roles = start_roles(config, models.policy, models.reward, parts=("learner",), on_plan=progress.plan)
        roles.learner.load(checkpoint)
        for step, metrics in replay(roles, folder, steps, config.rollout.micro_batch):
            for name in FIGURES:
                if name in metrics and step in found:
                    agrees = abs(metrics[name] - found[step][name]) <= TOLERANCE * max(1.0, abs(found[step][name]))
                    same = same and agrees
                    style = None if agrees else "red"
                    table.add_row(str(step), name, f"{found[step][name]:.6g}", f"{metrics[name]:.6g}", style=style)
    Console().print(table)
    return 0 if same else 1


def replay(roles: Roles, folder: Path, steps: Sequence[int], micro_batch: int) -> Iterator[tuple[int, Mapping[str, float]]]:
    """(step, metrics) of the learner's update on each kept rollout."""
    for step in steps:
        scored = read_rollout(rollout_path(folder, step))
        roles.learner.prepare_step(scored, micro_batch)
        yield step, roles.learner.update(scored)


def find_rollouts(folder: Path) -> tuple[Path, list[int]]:
    """The newest complete checkpoint that rollouts follow, and their steps. Raises InputError if there is none."""
    kept, faults = kept_steps(folder), []
    for step in sorted(kept, reverse=True):
        checkpoint = folder / "checkpoints" / f"step-{step}"
        if checkpoint.exists():
            try:
                verify_folder(checkpoint)
            except CheckpointError as error:
                faults.append(str(error))
                continue
            later = itertools.takewhile(lambda number: number in kept, itertools.count(step))  # up to a step that was forgotten
            return checkpoint, list(later)
    raise InputError(f"{folder} holds no checkpoint that kept rollouts follow{'; '.join(['', *faults])}")
