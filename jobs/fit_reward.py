"""Feedback log in, reward model out: import, propensity, noise rates, reward model; all in runs/<name>."""

from __future__ import annotations

from rich.console import Console

from actors.cluster.runtime import ray_cluster
from actors.system import start_roles
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.report.fit_panels import fit_sentences
from causalrm_ray.report.page import write_report
from jobs.support.feedback import import_feedback
from jobs.support.progress import Progress
from jobs.support.prompts import find_backbone
from jobs.support.run_folder import Run
from jobs.support.summary import fit_summary


def run(config: Config) -> int:
    """Run the job."""
    if config.feedback.source is None and config.feedback.url is None:
        raise ConfigError("feedback.source or feedback.url: fit-reward needs a log to read, got neither")
    run = Run(config)
    with Progress() as progress:
        backbone = find_backbone(config, config.model.reward, config.model.max_length, progress.pretraining)
        progress.phase("importing the log")
        imported = import_feedback(config, load_tokenizer(backbone))
        with ray_cluster(config.cluster, config.run.cache):
            roles = start_roles(config, policy=backbone, reward=backbone, parts=("log", "reward"))
            progress.phase("fitting propensity and reward")
            methods = [name for name in dict.fromkeys((config.reward.method, *config.reward.compare)) if name != "oracle"]
            fit = roles.refitter.refit("log", None, methods, on_states=progress.states)
            roles.refitter.end_fits()
    summary = {"import": imported, **fit_summary(fit)}
    run.summarise(summary)
    write_report(run.path, [], summary)
    model = run.path / fit.folders[config.reward.method]
    for sentence in fit_sentences(summary):
        Console().print(sentence, soft_wrap=True, markup=False, highlight=False)
    Console().print(f"reward model: {model}; see {run.path / 'report.html'}", soft_wrap=True)
    return 0
