"""Let simulated users react to a policy's answers; the log is runs/<name>/feedback.db and a snapshot of it feedback.parquet."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from actors.cluster.runtime import ray_cluster
from actors.system import start_roles
from causalrm_ray.config.train import Config
from causalrm_ray.data.log.store import open_log
from causalrm_ray.errors import ConfigError
from jobs.support.feedback import simulate_feedback
from jobs.support.progress import Progress
from jobs.support.prompts import PromptSource, find_models
from jobs.support.run_folder import Run


def run(config: Config) -> int:
    """Run the job."""
    if config.world.users == "none":
        raise ConfigError("world.users: simulate-feedback needs users, got 'none'")
    run = Run(config)
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        models = find_models(config, progress.pretraining)
        task = PromptSource(config, models)
        progress.phase("starting roles")
        roles = start_roles(config, models.policy, models.reward, parts=("log", "users", "generators"))
        progress.phase("filling the feedback log")
        simulate_feedback(config, task, roles)
    log = open_log(config)
    log.export(run.path / "feedback.parquet")
    counts = log.counts()
    run.summarise(asdict(counts))
    Console().print(
        f"{counts.impressions} impressions, {counts.events} events: {config.log_url}, {run.path / 'feedback.parquet'}",
        soft_wrap=True,
    )
    return 0
