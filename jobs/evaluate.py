"""Score a policy, and a reward model if one is named, on held-out topics of the embedded world."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.cluster.runtime import ray_cluster
from actors.system import start_roles
from causalrm_ray.config.train import EMBEDDED, Config
from causalrm_ray.errors import ConfigError
from causalrm_ray.models.states.scorer import backbone_of
from jobs.support.oracle import Oracle
from jobs.support.progress import Progress
from jobs.support.prompts import PromptSource, find_models
from jobs.support.run_folder import Run


def run(config: Config) -> int:
    """Run the job; the figures are printed and in runs/<name>/summary.json."""
    if not config.has_truth:
        raise ConfigError(
            "evaluate needs the embedded oracle: leave world.users, feedback.source and feedback.prompts at their defaults"
        )
    run = Run(config)
    judged = config.model.reward != EMBEDDED
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        models = find_models(config, progress.pretraining, fitted=True)
        task, truth = PromptSource(config, models), Oracle(config)
        progress.phase("starting roles")
        parts = ("generators", "reward") if judged else ("generators",)
        roles = start_roles(config, models.policy, backbone_of(models.reward), parts)
        progress.phase("answering held-out prompts")
        answers = roles.stream.sample(task.evaluation_requests())
        scores = truth.scores(answers)
        summary: dict[str, Any] = {
            "oracle_reward": {"mean": float(scores.mean()), "stderr": float(scores.std(ddof=1) / np.sqrt(len(scores)))},
            "levels": [int((scores == level).sum()) for level in range(5)],
        }
        if judged:
            impressions = task.impressions(answers, task.clock(0))
            shown = [done for done in answers if not done.is_blank]
            summary["reward_model"] = truth.judge(roles.score(shown, models.reward), impressions)
    run.summarise(summary)
    table = Table("figure", "value", box=None)
    table.add_row("oracle reward (0 to 4)", f"{summary['oracle_reward']['mean']:.3f} ± {summary['oracle_reward']['stderr']:.3f}")
    table.add_row("answers at level 0, 1, 2, 3, 4", " ".join(map(str, summary["levels"])))
    for name, value in summary.get("reward_model", {}).items():
        table.add_row(f"reward model {name}", "undefined: users like all answers, or none" if value is None else f"{value:.3f}")
    Console().print(table)
    return 0
