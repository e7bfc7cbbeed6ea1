"""Kill roles, drivers and nodes of a run, one after another, and audit what is left: is anything lost, or there twice?

undisturbed run -> its reward
attacked run    -> kill, wait for the next step, kill again ... -> audit of log, steps, versions; reward against the other's,
                   and where no death sets answers to other batches, every figure and weight against the other's, to the bit
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from actors.cluster.local_cluster import LocalCluster, local_cluster
from causalrm_ray.checkpoint import newest_complete, read_json, write_json
from causalrm_ray.config.chaos import ChaosConfig
from causalrm_ray.config.options import dump_config, load_tree
from causalrm_ray.config.train import Config
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.errors import InputError
from causalrm_ray.types import Impression
from causalrm_ray.world.users import SimulatedUsers
from jobs.lab.benchmark import write_markdown
from jobs.support.progress import Progress
from jobs.support.prompts import Task, find_models
from jobs.support.run_folder import TIMINGS, Run
from jobs.support.supervise import ROOT

LONGEST_PAUSE_S = 4.0  # between a step and the next kill: it may hit any phase of the steps that follow
REFIT_EVERY = 20  # steps, at most: some kills are to meet refits
POLL_S = 0.2
KNOWN = ("prompt", "response", "policy_version", "time")  # of an impression, to its user
NOISE = 3.0  # standard errors between the two runs' rewards that chance may make
REBATCHING = {"generator", "node"}  # their answers come from other batches then, so log-probabilities are rounded otherwise


def run(config: ChaosConfig) -> int:
    """Run the job. Returns 0 if nothing was lost or doubled, else 1."""
    folder = config.run.path
    if (folder / "chaos.json").exists():
        raise InputError(f"{folder} holds figures already: remove it, or choose another run.name")
    if "train worker" in config.victims and config.train_workers == 0:
        raise InputError("victims must not hold 'train worker' with train_workers=0")
    dump_config(config, folder / "config.yaml")
    with Progress() as progress, local_cluster(config.nodes, config.run.cache) as cluster:
        calm = main_config(config, cluster.address, "calm") if config.undisturbed else None
        if calm:
            progress.phase("undisturbed run")
            _start(calm).wait()
        progress.phase(f"attacked run, {config.kills} kills")
        attacked = main_config(config, cluster.address, "attacked")
        victims = Victims(attacked, cluster)
        try:
            kills = attack(config, victims, progress)
            status = victims.driver.wait()
        finally:
            victims.end()
    faults = audit(attacked)
    if calm:
        faults += audit_reward(attacked, calm)
        faults += [] if REBATCHING & set(config.victims) else differing(attacked.run.path, calm.run.path)
    if status:
        faults.append(f"the job ended with status {status}")
    if len(kills) < config.kills:
        faults.append(f"only {len(kills)} of {config.kills} kills before the run's end")
    _conclude(config, kills, faults)
    return 1 if faults else 0


def main_config(config: ChaosConfig, address: str, name: str) -> Config:
    """The main tree of a small run on the cluster: synchronous, a checkpoint every second step."""
    overrides = {
        "run.name": "run",  # of both: the ids of impressions begin with it, on which their users' reactions depend
        "run.dir": config.run.path / name,
        "run.cache": config.run.cache,
        "run.seed": config.run.seed,
        "cluster.address": address,
        "cluster.timeout_s": config.timeout_s,
        "world.impressions": 600,
        "reward.epochs": 2,
        "reward.compare": "[]",
        "reward.refit_every": max(2, min(config.steps // 3, REFIT_EVERY)),
        "reward.workers": config.train_workers,
        "rollout.engine": config.engine,
        "rollout.prompts_per_step": 16,
        "loop.steps": config.steps,
        "loop.checkpoint_every": 2,
        "loop.evaluation_prompts": 120,
        "loop.max_failures": config.kills,
    }
    return load_tree(Config, None, [f"{key}={value}" for key, value in overrides.items()])


class Victims:
    """The processes of a run that goes on under attack: of its driver, and of its roles on the cluster."""

    def __init__(self, config: Config, cluster: LocalCluster) -> None:
        self.path = config.run.path
        self.driver = _start(config)
        self.killed = 0.0
        self._config, self._cluster = config, cluster

    def kill(self, victim: str, rng: random.Random) -> bool:
        """kill -9, at `killed`; False where there is none to kill now."""
        if _summary(self.path) is not None:
            return False
        self.killed = time.monotonic()
        if victim == "node":
            self._cluster.lose_node()
            return True
        if victim == "cluster":
            return self._kill_all()
        found = psutil.Process(self.driver.pid).children() if victim == "driver" else self._cluster.processes(victim)
        if not found:
            return False
        rng.choice(sorted(found, key=lambda process: process.pid)).kill()
        return True

    def end(self) -> None:
        """Leave no driver behind."""
        if self.driver.poll() is None:
            self.driver.send_signal(signal.SIGSTOP)  # that it starts no other
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.driver.kill()
            self.driver.wait()

    def wait(self, true: Callable[[], bool], timeout_s: float, what: str) -> bool:
        """Wait until `true`; False if the run ends first. Raises TimeoutError that names `what`."""
        deadline = time.monotonic() + timeout_s
        while self.driver.poll() is None:
            if true():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within timeout_s={timeout_s:g} s")
            time.sleep(POLL_S)
        return False

    def _kill_all(self) -> bool:
        """The run goes on from its newest checkpoint, on another cluster."""
        if newest_complete(self.path / "checkpoints")[0] is None:
            return False
        self.end()
        self._cluster.lose_all()
        self.driver = _start(self._config, "resume=true", f"cluster.address={self._cluster.address}")
        return True


def attack(config: ChaosConfig, victims: Victims, progress: Progress) -> list[dict[str, Any]]:
    """Kill one victim after another while the run goes on; who, when, and how long until the next step was done."""
    rng = random.Random(config.run.seed)
    plan = [config.victims[number % len(config.victims)] for number in range(config.kills)]
    rng.shuffle(plan)
    kills: list[dict[str, Any]] = []
    path = victims.path
    victims.wait(lambda: _steps(path) > 0, config.timeout_s, "the first step")
    progress.tasks("kills", len(plan))
    for victim in plan:
        time.sleep(rng.uniform(0.0, LONGEST_PAUSE_S))
        if not victims.wait(partial(victims.kill, victim, rng), config.timeout_s, f"a {victim} to kill"):
            break
        before = _steps(path)
        if not victims.wait(partial(_went_on, path, before), config.timeout_s, f"a step after the death of {victim}"):
            break
        kills.append({"victim": victim, "at_step": before, "seconds": time.monotonic() - victims.killed})
        progress.task(len(kills), f"{victim} at step {before}, next step after {kills[-1]['seconds']:.1f} s")
    return kills


def audit(attacked: Config) -> list[str]:
    """What is wrong with the attacked run; nothing, as a rule."""
    faults = []
    metrics = Run.read_metrics(attacked.run.path)
    if [row["step"] for row in metrics] != list(range(attacked.loop.steps)):
        faults.append(f"steps must be 0 to {attacked.loop.steps - 1}, each once, got {[row['step'] for row in metrics]}")
    versions = [row["reward_version"] for row in metrics]
    if versions != sorted(versions):
        faults.append(f"versions of the reward model must never fall, got {versions}")
    return [*faults, *audit_log(attacked)]


def audit_reward(attacked: Config, calm: Config) -> list[str]:
    """Whether the two runs end with rewards that chance may tell apart."""
    found = {name: _summary(config.run.path) for name, config in (("attacked", attacked), ("calm", calm))}
    if None in found.values():
        return [f"runs without a summary: {[name for name, summary in found.items() if summary is None]}"]
    rewards = [summary["oracle_reward"] for summary in found.values() if summary]
    apart = abs(rewards[0]["after"] - rewards[1]["after"])
    noise = NOISE * sum(reward["stderr"] ** 2 for reward in rewards) ** 0.5
    return [f"the final rewards must be within {noise:.2f}, got {apart:.2f}"] if apart > noise else []


def differing(attacked: Path, calm: Path) -> list[str]:
    """In what the two runs differ, where they should be equal to the bit: figures of a step but for times, weights at the end."""
    names = []
    for here, there in zip(Run.read_metrics(attacked), Run.read_metrics(calm), strict=False):
        keys = sorted((here.keys() | there.keys()) - TIMINGS)
        names += [f"{name} of step {here['step']}" for name in keys if here.get(name) != there.get(name)]
    ours, theirs = _final_weights(attacked), _final_weights(calm)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not ours[name].equal(theirs[name]):
            names.append(name)
    return [f"{len(names)} figures and weights differ from the undisturbed run's, such as {names[0]}"] if names else []


def _final_weights(path: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint; nothing where there is none."""
    checkpoint, _ = newest_complete(path / "checkpoints")
    return load_file(checkpoint / "policy" / "model.safetensors") if checkpoint else {}


def audit_log(config: Config) -> list[str]:
    """Is every prompt of the log and of each step shown exactly once, and every reaction of its user logged exactly once?"""
    task = Task(config, find_models(config))
    requests = [*task.log_requests(), *(request for step in range(config.loop.steps) for request in task.step_requests(step))]
    log = FeedbackLog(config.log_url, config.feedback.signals)
    rows, logged = log.snapshot().to_list(), [event for _, event in log.stream()]
    log.close()
    shown = Counter(row["impression_id"].rsplit("/", 1)[0] for row in rows)
    faults = differences("prompts", Counter(request.prompt.id for request in requests), shown)
    users = SimulatedUsers(config.world, config.run.seed)
    shown_to = [Impression(id=row["impression_id"], **{name: row[name] for name in KNOWN}) for row in rows]
    expected = Counter(event.id for impression in shown_to for event in users.react(impression))
    return faults + differences("feedback events", expected, Counter(event.id for event in logged))


def differences(what: str, expected: Counter[str], found: Counter[str]) -> list[str]:
    """What of `what` is lost and what is there too often, in words."""
    lost, extra = expected - found, found - expected
    faults = [f"{lost.total()} {what} lost, such as {min(lost)}"] if lost else []
    return faults + ([f"{extra.total()} {what} too many, such as {min(extra)}"] if extra else [])


def _went_on(path: Path, before: int) -> bool:
    """Whether a step was done since: a resumed run first takes back those after its checkpoint."""
    return _steps(path) > before or _summary(path) is not None


def _steps(path: Path) -> int:
    """Steps done."""
    rows = Run.read_metrics(path)
    return rows[-1]["step"] + 1 if rows else 0


def _summary(path: Path) -> dict[str, Any] | None:
    file = path / "summary.json"
    return read_json(file) if file.exists() else None


def _start(config: Config, *overrides: str) -> subprocess.Popen[bytes]:
    file = config.run.dir / "told.yaml"
    dump_config(config, file)
    with (config.run.dir / "output.log").open("ab") as log:
        command = [sys.executable, "-P", "-m", "jobs", "train-policy", "--config", str(file), *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _conclude(config: ChaosConfig, kills: Sequence[Mapping[str, Any]], faults: Sequence[str]) -> None:
    folder = config.run.path
    write_json(folder / "chaos.json", {"kills": list(kills), "faults": list(faults)})
    lines = []
    for victim in config.victims:
        seconds = [kill["seconds"] for kill in kills if kill["victim"] == victim]
        if seconds:
            lines.append([victim, str(len(seconds)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"])
    columns = ("victim", "kills", "median seconds to the next step", "longest")
    write_markdown("time from a kill to the end of the next step", columns, lines, folder / "table.md")
    console = Console(highlight=False)
    shown = Table(*columns, box=None)
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    for fault in faults:
        console.print(fault, style="red", markup=False)
    console.print(f"{len(kills)} kills, {len(faults)} faults; see {folder}", markup=False, soft_wrap=True)
