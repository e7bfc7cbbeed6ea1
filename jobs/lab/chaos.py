"""Kill roles, drivers and nodes of a run, one after another, and audit the result: is anything lost or duplicated?

baseline run    -> its reward
attacked run    -> kill, wait for the next step, kill again ... -> audit of log, steps, versions; reward against the baseline's,
                   and where no death changes batches, every figure and weight against the baseline's, to the bit
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import pandas as pd
import psutil

from actors.cluster.local_cluster import LocalCluster
from causalrm_ray.checkpoint import newest_complete, write_json
from causalrm_ray.config.chaos import ChaosConfig, Victim
from causalrm_ray.config.options import dump_config, load_tree
from causalrm_ray.config.train import Config
from causalrm_ray.errors import InputError
from jobs.lab.chaos_audit import audit, audit_reward, differing
from jobs.lab.tables import show, write_markdown
from jobs.support.progress import Progress, console
from jobs.support.run_folder import Run
from jobs.support.supervise import ROOT

LONGEST_PAUSE_S = 4.0  # between a step and the next kill: it may hit any phase of the steps that follow
REFIT_EVERY = 20  # steps, at most, so that some kills happen during refits
POLL_S = 0.2
REBATCHING = {"generator", "node"}  # killing one changes the batches of answers, and with them the rounding of log-probabilities


def run(config: ChaosConfig) -> int:
    """Run the job. Returns 0 if nothing was lost or duplicated, else 1."""
    folder = config.run.path
    if (folder / "chaos.json").exists():
        raise InputError(f"{folder} holds figures already: remove it, or choose another run.name")
    if "train worker" in config.victims and config.train_workers == 0:
        raise InputError("victims must not hold 'train worker' with train_workers=0")
    dump_config(config, folder / "config.yaml")
    with Progress() as progress, LocalCluster(config.nodes, config.run.cache) as cluster:
        baseline = main_config(config, cluster.address, "baseline") if config.baseline else None
        if baseline:
            progress.phase("baseline run, without kills")
            _start(baseline).wait()
        progress.phase(f"attacked run, {config.kills} kills")
        attacked = main_config(config, cluster.address, "attacked")
        with contextlib.closing(Victims(attacked, cluster)) as victims:
            kills = attack(config, victims, progress)
            status = victims.driver.wait()
    faults = audit(attacked)
    if baseline:
        faults += audit_reward(attacked, baseline)
        faults += [] if REBATCHING & set(config.victims) else differing(attacked.run.path, baseline.run.path)
    if status:
        faults.append(f"the job ended with status {status}")
    if len(kills) < config.kills:
        faults.append(f"only {len(kills)} of {config.kills} kills before the run's end")
    _conclude(config, kills, faults)
    return 1 if faults else 0


def main_config(config: ChaosConfig, address: str, name: str) -> Config:
    """The main tree of a small run on the cluster: synchronous, a checkpoint every second step."""
    overrides = {
        "run.name": "run",  # of both runs: ids of impressions begin with it, and users' reactions depend on these
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
    """The processes of a run under attack: its driver's, and those of its roles on the cluster."""

    def __init__(self, config: Config, cluster: LocalCluster) -> None:
        self.path = config.run.path
        self.driver = _start(config)
        self.killed = 0.0
        self._config, self._cluster = config, cluster

    def kill(self, victim: str, rng: random.Random) -> bool:
        """Kill with SIGKILL, at the time `killed`; False if there is none to kill now."""
        if _has_ended(self.path):
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

    def close(self) -> None:
        """End the run's driver and its supervisor, if they still run."""
        if self.driver.poll() is None:
            self.driver.send_signal(signal.SIGSTOP)  # so that it starts no other
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.driver.kill()
            self.driver.wait()

    def wait(self, true: Callable[[], bool], timeout_s: float, what: str) -> bool:
        """Wait until `true()`; False if the run ends first. Raises TimeoutError that names `what`."""
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
        self.close()
        self._cluster.lose_all()
        self.driver = _start(self._config, "resume=true", f"cluster.address={self._cluster.address}")
        return True


@dataclass(frozen=True)
class Kill:
    """A process or node that was killed, after how many steps, and the seconds until the next step was done."""

    victim: Victim
    at_step: int
    seconds: float


def attack(config: ChaosConfig, victims: Victims, progress: Progress) -> list[Kill]:
    """Kill one victim after another while the run goes on."""
    rng = random.Random(config.run.seed)
    plan = [config.victims[number % len(config.victims)] for number in range(config.kills)]
    rng.shuffle(plan)
    kills: list[Kill] = []
    path = victims.path
    victims.wait(lambda: _steps(path) > 0, config.timeout_s, "the first step")
    progress.tasks("kills", len(plan))
    for victim in plan:
        time.sleep(rng.uniform(0.0, LONGEST_PAUSE_S))
        if not victims.wait(partial(victims.kill, victim, rng), config.timeout_s, f"a {victim} to kill"):
            break
        before = _steps(path)
        if not victims.wait(partial(_went_on, path, before), config.timeout_s, f"a step after killing {victim}"):
            break
        kills.append(Kill(victim, before, time.monotonic() - victims.killed))
        progress.task(len(kills), f"{victim} at step {before}, next step after {kills[-1].seconds:.1f} s")
    return kills


def _steps(path: Path) -> int:
    """Steps done."""
    rows = Run.read_metrics(path)
    return rows[-1]["step"] + 1 if rows else 0


def _went_on(path: Path, before: int) -> bool:
    """Whether a step was done since: a resumed run first repeats those after its checkpoint."""
    return _steps(path) > before or _has_ended(path)


def _has_ended(path: Path) -> bool:
    return (path / "summary.json").exists()


def _start(config: Config, *overrides: str) -> subprocess.Popen[bytes]:
    file = config.run.dir / "options.yaml"
    dump_config(config, file)
    with (config.run.dir / "output.log").open("ab") as log:
        command = [sys.executable, "-P", "-m", "jobs", "train-policy", "--config", str(file), *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _conclude(config: ChaosConfig, kills: Sequence[Kill], faults: Sequence[str]) -> None:
    folder = config.run.path
    write_json(folder / "chaos.json", {"kills": [asdict(kill) for kill in kills], "faults": list(faults)})
    groups = pd.DataFrame(kills, columns=[field.name for field in fields(Kill)]).groupby("victim")["seconds"]
    found = groups.agg(["count", "median", "max"]).reindex([name for name in config.victims if name in groups.groups])
    table = pd.DataFrame(
        {
            "victim": found.index,
            "kills": found["count"],
            "median seconds to the next step": found["median"].map("{:.1f}".format),
            "longest": found["max"].map("{:.1f}".format),
        }
    )
    write_markdown(table, folder / "table.md", "time from a kill to the end of the next step")
    show(table, folder)
    for fault in faults:
        console.print(fault, style="red", markup=False)
    console.print(f"{len(kills)} kills, {len(faults)} faults")
