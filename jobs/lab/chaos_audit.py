"""Faults of a run that was attacked: what was lost or duplicated, and how it differs from the same run without kills.

log, steps, versions of the attacked run --> faults, in words; an empty list if all is well
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from causalrm_ray.checkpoint import newest_complete, read_json
from causalrm_ray.config.train import Config
from causalrm_ray.data.log.store import open_log
from jobs.support.oracle import Oracle
from jobs.support.prompts import PromptSource, find_models
from jobs.support.run_folder import TIMINGS, Run

NOISE = 3.0  # standard errors that the two runs' rewards may differ by chance


def audit(attacked: Config) -> list[str]:
    """Faults in the steps, the versions of the reward model and the log of the attacked run."""
    faults, metrics = [], Run.read_metrics(attacked.run.path)
    steps, versions = ([row[name] for row in metrics] for name in ("step", "reward_version"))
    if steps != list(range(attacked.loop.steps)):
        faults.append(f"steps must be 0 to {attacked.loop.steps - 1}, each once, got {steps}")
    if versions != sorted(versions):
        faults.append(f"versions of the reward model must never fall, got {versions}")
    return [*faults, *audit_log(attacked)]


def audit_reward(attacked: Config, baseline: Config) -> list[str]:
    """A fault if the final rewards of the two runs differ by more than chance explains."""
    files = [config.run.path / "summary.json" for config in (attacked, baseline)]
    if missing := [str(file) for file in files if not file.exists()]:
        return [f"runs must end with a summary, missing: {', '.join(missing)}"]
    rewards = [read_json(file)["oracle_reward"] for file in files]
    apart = abs(rewards[0]["after"] - rewards[1]["after"])
    noise = NOISE * sum(reward["stderr"] ** 2 for reward in rewards) ** 0.5
    return [f"the final rewards must be within {noise:.2f}, got {apart:.2f}"] if apart > noise else []


def differing(attacked: Path, baseline: Path) -> list[str]:
    """A fault if the two runs differ in a bit of the steps' figures, timings apart, or of the final weights."""
    names = []
    for here, there in zip(Run.read_metrics(attacked), Run.read_metrics(baseline), strict=False):
        keys = sorted((here.keys() | there.keys()) - TIMINGS)
        names += [f"{name} of step {here['step']}" for name in keys if here.get(name) != there.get(name)]
    ours, theirs = _final_weights(attacked), _final_weights(baseline)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not ours[name].equal(theirs[name]):
            names.append(name)
    return [f"{len(names)} figures and weights differ from the baseline's, such as {names[0]}"] if names else []


def _final_weights(path: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint; nothing where there is none."""
    checkpoint, _ = newest_complete(path / "checkpoints")
    return load_file(checkpoint / "policy" / "model.safetensors") if checkpoint else {}


def audit_log(config: Config) -> list[str]:
    """Is every prompt of the log and of each step shown exactly once, and every reaction of its user logged exactly once?"""
    task = PromptSource(config, find_models(config))
    requests = [*task.log_requests(), *(request for step in range(config.loop.steps) for request in task.step_requests(step))]
    impressions, expected, found = Oracle(config).reactions(open_log(config))
    shown = Counter(impression.id.rsplit("/", 1)[0] for impression in impressions)
    faults = differences("prompts", Counter(request.prompt.id for request in requests), shown)
    return faults + differences("feedback events", expected, found)


def differences(what: str, expected: Counter[str], found: Counter[str]) -> list[str]:
    """What of `what` is lost and what is there too often, in words."""
    lost, extra = expected - found, found - expected
    faults = [f"{lost.total()} {what} lost, such as {min(lost)}"] if lost else []
    return faults + ([f"{extra.total()} {what} too many, such as {min(extra)}"] if extra else [])
