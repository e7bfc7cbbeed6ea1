"""The main job under supervision: if its driver dies, or loses a role that it needs, another continues from the checkpoint.

this process (light)  --Attempt, JSON on stdin-->  a driver
          ^                                           |
          +---- exit status: 0, an error, a death ----+     a death: another one, from the newest complete checkpoint

SIGTERM, as clouds send it before they take a machine back, is passed on: the driver ends its step, saves, and ends.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from causalrm_ray.checkpoint import newest_complete
from causalrm_ray.config.base import IN_PROCESS, Section
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError
from jobs.support.errors import naming_full_disks, refuse
from jobs.support.lock import run_lock

ROOT = Path(__file__).parents[2]
JOB = "jobs.train_policy"  # stands above this room, and is heavy: imported by name, in the process that runs it
LOST = 75  # a driver that lost a role (EX_TEMPFAIL): another may succeed

console = Console(highlight=False, soft_wrap=True)


class Attempt(Section):
    """What a driver is started with. `fresh_start`: it begins over what an attempt without a checkpoint left."""

    config: Config
    fresh_start: bool = False


def run(config: Config) -> int:
    """Run the job, in this process if its death must not start another attempt. Returns its exit status."""
    if config.world.users != "none" and (config.feedback.source or config.feedback.prompts):
        raise ConfigError(
            "world.users must be none with feedback.source or feedback.prompts: simulated users know the embedded world only"
        )
    if config.loop.max_failures == 0 or config.cluster.address == IN_PROCESS:
        return importlib.import_module(JOB).run(config)
    with run_lock(config.run):  # a refusal comes at once; the driver itself holds the lock, and releases it when it dies
        pass
    attempt, failures = Attempt(config=config), 0
    before = _checkpoint(config)
    while True:
        status = _drive(attempt)
        found = _checkpoint(config)
        if not _was_death(status, before, found):
            return status
        failures += 1
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if failures > config.loop.max_failures:
            console.print(f"the job ended {how}; loop.max_failures={config.loop.max_failures} is used up", style="red")
            return 1
        where = f"from {found.name}" if found else "from the start"
        console.print(f"the job ended {how}: {where} again ({failures} of loop.max_failures)", style="yellow")
        resumed = config.run.model_copy(update={"resume": found is not None})
        attempt = Attempt(config=config.model_copy(update={"run": resumed}), fresh_start=found is None)
        before = found


def _drive(attempt: Attempt) -> int:
    """Start a driver and wait for it. Returns its exit status; negative: the signal that killed it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-P", "-m", "jobs.support.supervise"]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
    previous = signal.signal(signal.SIGTERM, lambda *_: driver.send_signal(signal.SIGTERM))
    try:
        driver.communicate(attempt.model_dump_json())
    finally:  # after Ctrl-C, too, which the terminal sent to the driver as well
        status = driver.wait()
        signal.signal(signal.SIGTERM, previous)
    return status


def _checkpoint(config: Config) -> Path | None:
    return newest_complete(config.run.path / "checkpoints")[0]


def _was_death(status: int, before: Path | None, after: Path | None) -> bool:
    """Whether another attempt may succeed: the driver was killed, lost a role, or failed after a new checkpoint.

    An error of its own without a new checkpoint would only occur again.
    """
    if status < 0:
        return -status not in (signal.SIGTERM, signal.SIGINT)
    return status == LOST or (status == 1 and before != after)


def drive() -> int:
    """The driver: reads on stdin the attempt that it is."""
    from actors.errors import RoleDiedError, RoleTimeoutError

    attempt = Attempt.model_validate_json(sys.stdin.read())
    try:
        with naming_full_disks(attempt.config.run):
            return importlib.import_module(JOB).run(attempt.config, attempt.fresh_start)
    except (RoleDiedError, RoleTimeoutError) as error:
        refuse("train-policy", error)
        return LOST
    except (ConfigError, InputError) as error:
        return refuse("train-policy", error)


if __name__ == "__main__":
    sys.exit(drive())
