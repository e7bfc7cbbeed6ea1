"""The main job: tune a policy on the feedback that users choose to give.

log --fit--> propensity, noise rates, reward model
each step:   completions --> rewards --> learner --> weights
                  +--> users --> log --(every k steps)--> refit behind a gate
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from actors.cluster.runtime import ray_cluster
from actors.system import Roles, start_roles
from actors.weights.agreement import check_agreement
from causalrm_ray.checkpoint import atomic_folder, read_json, write_json
from causalrm_ray.config.train import Config
from causalrm_ray.data.log.store import open_log
from causalrm_ray.errors import InputError
from causalrm_ray.report.fit_panels import fit_sentences
from causalrm_ray.report.page import write_report
from causalrm_ray.rl.drift import LOW_ESS, low_ess
from causalrm_ray.types import Scored
from jobs.support.errors import discarding_refused_import
from jobs.support.feedback import import_feedback, simulate_feedback
from jobs.support.lock import run_lock
from jobs.support.log import run_log, warn
from jobs.support.oracle import Oracle
from jobs.support.progress import Progress
from jobs.support.prompts import PromptSource, describe_adapters, find_models
from jobs.support.run_folder import STOPPED, MemoryMonitor, RolloutWriter, Run, StopRequest
from jobs.support.summary import Start, judge_start, promotion_metrics, summarise
from jobs.support.trackers import Trackers

PROBES = 8  # answers of each generator on which it is compared with the learner


def run(config: Config, fresh_start: bool = False) -> int:
    """Run the job; its artefacts are in runs/<name>. `fresh_start`: replace what an attempt without a checkpoint has left."""
    began = time.perf_counter()
    with (
        run_lock(config.run),
        run_log(config.run),
        Trackers(config.loop.trackers) as trackers,
        discarding_refused_import(config),
        MemoryMonitor() as memory,
        Progress() as progress,
    ):
        run = Run(config, fresh_start, trackers)
        models = find_models(config, progress.pretraining)
        adapters = describe_adapters(config, models)
        prompts = PromptSource(config, models)
        if not config.has_truth:
            import_feedback(config, prompts.tokenizer)
        elif config.feedback.url:  # simulated users will fill it: can it be opened?
            open_log(config).close()
        run.start_tracking(config)
        with ray_cluster(config.cluster, config.run.cache):
            if adapters:
                progress.phase(adapters)
            progress.phase("starting roles")
            roles = start_roles(config, models.policy, models.reward, on_plan=progress.plan, on_replacement=progress.phase)
            summary = train(config, run, prompts, roles, progress)
            roles.refitter.end_fits()
        if summary is None:
            return STOPPED
        summary |= {"wall_s": time.perf_counter() - began, "peak_memory_bytes": memory.peak_bytes}
        run.summarise(summary)
        write_report(run.path, run.read_metrics(run.path), summary)
        progress.conclude(run.path, summary)
    return 0


def train(config: Config, run: Run, prompts: PromptSource, roles: Roles, progress: Progress) -> dict[str, Any] | None:
    """The loop. Returns the summary, or None if SIGTERM ended it after a checkpoint."""
    oracle = Oracle(config)
    if run.checkpoint:
        facts = read_json(run.checkpoint / "facts.json")
        if "start" not in facts:
            raise InputError(f"{run.checkpoint} was written by an earlier version: start a new run")
        start = Start(**facts["start"])
        roles.load(run.checkpoint, facts["serving"])
        check_engines(config, prompts, roles)
    else:
        roles.publish()
        check_engines(config, prompts, roles)
        start = prepare(config, prompts, oracle, roles, progress)
        save(run, roles, start, 0)

    stop = StopRequest()
    with RolloutWriter(run) as rollouts:
        for step in progress.steps(run.first_step, config.loop.steps):
            last = step + 1 == config.loop.steps
            ahead = config.learner.staleness > 0 and not last
            metrics = policy_step(prompts, oracle, roles, step, ahead=ahead, keep=partial(rollouts.write, step))
            if due(step, config.reward.refit_every) and not last and roles.refitter.log_has_grown():
                progress.phase("refitting propensity and reward")
                refit = roles.refitter.refit(f"step-{step + 1}", prompts.as_of(step + 1), [config.reward.method])
                metrics |= promotion_metrics(refit)
            run.log(step, metrics)
            progress.step(step, metrics)
            check_step(config, metrics)
            if due(step, config.loop.checkpoint_every) or last or stop.asked:
                rollouts.wait()
                save(run, roles, start, step + 1)
                rollouts.forget(checkpoint=step + 1)  # those since the previous checkpoint can be replayed
                progress.phase(f"checkpoint step-{step + 1}")
            if stop.asked and not last:
                progress.phase("stopped by SIGTERM; continue with resume=true")
                return None

    progress.phase("evaluating")
    return summarise(config, run, roles, prompts, oracle, start)


def check_engines(config: Config, prompts: PromptSource, roles: Roles) -> None:
    """Refuse engines that do not compute what the learner does: they have taken its weights in once."""
    gaps = roles.engine_gaps(prompts.evaluation_requests()[:PROBES])
    check_agreement(gaps, config.model.dtype, config.rollout.engine)


def check_step(config: Config, metrics: Mapping[str, float]) -> None:
    """The same of all answers of a step that the newest weights wrote, those of a generator that was replaced among them."""
    if metrics["staleness"] == 0:
        check_agreement({"its answers": metrics["logprob_mismatch_mean_abs"]}, config.model.dtype, config.rollout.engine)
        if metrics["importance_weight_ess"] < LOW_ESS:
            warn(low_ess(metrics["importance_weight_ess"]))


def prepare(config: Config, prompts: PromptSource, oracle: Oracle, roles: Roles, progress: Progress) -> Start:
    """Fill the log, fit propensity, noise rates and reward models on it, and measure the starting policy."""
    shown = 0
    if config.has_truth:
        progress.phase("filling the feedback log")
        shown = simulate_feedback(config, prompts, roles)
    progress.phase("fitting propensity and reward")
    methods = list(dict.fromkeys((config.reward.method, *config.reward.compare)))
    if not oracle.known and "oracle" in methods:
        methods.remove("oracle")
    preferences = oracle.preferences if "oracle" in methods else None
    fit = roles.refitter.refit("log", prompts.as_of(0), methods, preferences, progress.states)
    if not config.reward.refit_every:
        roles.refitter.end_fits()
    progress.phase("measuring the start")
    start = judge_start(config, roles, prompts, oracle, fit, shown)
    for sentence in fit_sentences(start.fit):
        progress.phase(sentence)
    return start


def policy_step(
    prompts: PromptSource,
    oracle: Oracle,
    roles: Roles,
    step: int,
    shown: bool = True,
    ahead: bool = False,
    keep: Callable[[Sequence[Scored]], None] = lambda scored: None,
) -> dict[str, float]:
    """Answers stream to reward model, learner and (if `shown`) users; the learner updates; the generators get its weights.

    `ahead`: meanwhile the generators begin the next step, and continue under the new weights when these arrive. `keep` gets the
    scored answers that the learner trains on; it must not block.
    """
    began = time.perf_counter()
    show = (lambda done: prompts.impressions(done, prompts.clock(step))) if shown else (lambda done: [])
    scored = roles.stream.rollout(prompts.step_requests(step), show)
    keep(scored)
    if ahead:
        roles.stream.begin(prompts.step_requests(step + 1))
    metrics = {**oracle.rollout_metrics(scored), **roles.learner.update(scored), **roles.publish()}
    return {**metrics, "seconds": time.perf_counter() - began}


def save(run: Run, roles: Roles, start: Start, step: int) -> None:
    """Write checkpoint `step`, whole or not at all; then delete what is not kept (loop.keep)."""
    with atomic_folder(run.path / "checkpoints" / f"step-{step}") as folder:
        write_json(folder / "facts.json", {"start": asdict(start), "serving": roles.save(folder), "step": step})
    run.retire(step)


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is due after `step`."""
    return every > 0 and (step + 1) % every == 0
