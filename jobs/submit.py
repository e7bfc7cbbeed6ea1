"""Submit a job to a cluster, follow its log, and exit with its status. Ctrl-C only stops following."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors.cluster.job_server import JobServer
from causalrm_ray.config.options import find_run, load_tree
from causalrm_ray.config.submit import SubmitConfig, SubmitSection
from causalrm_ray.errors import ConfigError, InputError
from jobs.catalog import JOBS

console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class SubmissionRequest:
    """Options of the submission, the job's command line in the cluster, and the metadata kept with it."""

    options: SubmitSection
    command: list[str]
    facts: dict[str, str]


def submit(file: Path | None, words: Sequence[str]) -> int:
    """Submit the job that `words` name. Returns its exit status, or 0 if it is not followed."""
    asked = read_request(file, words)
    missing = [name for name in asked.options.env if name not in os.environ]
    if missing:
        raise InputError(f"submit.env: not set here: {', '.join(missing)}")
    server = JobServer(asked.options.address)
    env = {name: os.environ[name] for name in asked.options.env}
    id = server.submit(asked.command, asked.options.working_dir, env, asked.facts, asked.options.id)
    console.print(f"submitted {id} to {server.address}: {shlex.join(asked.command)}")
    if asked.options.follow:
        return follow(server, id)
    console.print(what_next(server, id))
    return 0


def read_request(file: Path | None, words: Sequence[str]) -> SubmissionRequest:
    """The request in `words` and the job's `file`: the job, its options and those of `submit`, all checked here.

    The job joins the cluster that it runs in, unless its options name another. Raises ConfigError.
    """
    config = load_tree(SubmitConfig, None, [word for word in words if word.startswith("submit.")])
    name, *overrides = [word for word in words if not word.startswith("submit.")] or [""]
    able = [known for known, job in JOBS.items() if "cluster" in job.options().model_fields]
    if name not in able:
        raise ConfigError(f"submit needs a job, one of {', '.join(able)}, got {name!r}")
    job, defaults = JOBS[name], [f"run.name={name}"]
    tree = job.options()
    run = find_run(tree, file, overrides, defaults)
    if job.uses_run != "none" and not run.dir.expanduser().is_absolute():
        raise ConfigError(
            f"run.dir must be an absolute folder on storage that all nodes share, got {run.dir}: a submitted job's own is lost"
        )
    if (clash := config.submit.working_dir / "jobs.py").is_file() and not clash.with_suffix("").is_dir():
        raise ConfigError(
            f"submit.working_dir: {clash} has the name of a package of causalrm-ray and would take its place: rename it"
        )
    command = ["python", "-m", "jobs", name, *overrides]
    if file:
        command += ["--config", _inside(config.submit.working_dir, file)]
    if run.resume or job.uses_run == "reads":  # the other options are in the run's folder, which the cluster sees
        joins = not any(word.startswith(("cluster.address=", "address=")) for word in overrides)
    else:
        joins = load_tree(tree, file, overrides, defaults).model_dump()["cluster"]["address"] is None
    facts = {"job": name} | ({"run": str(run.dir / run.name)} if job.uses_run != "none" else {})
    return SubmissionRequest(config.submit, [*command, "cluster.address=auto"] if joins else command, facts)


def _inside(folder: Path, file: Path) -> str:
    """The path of `file` relative to `folder`, which is sent to the cluster."""
    try:
        return str(file.resolve().relative_to(folder.resolve()))
    except ValueError:
        raise ConfigError(f"--config must lie in submit.working_dir={folder}, which the job is sent with, got {file}") from None


def follow(server: JobServer, id: str) -> int:
    """Print the log of a job until it ends; its exit status, 130 after Ctrl-C, 1 if the connection broke."""
    try:
        server.follow(id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        console.print(f"\n{id} goes on. {what_next(server, id)}")
        return 128 + signal.SIGINT
    except ConnectionError as error:
        console.print(f"{error}. {what_next(server, id)}")
        return 1
    job = server.look(id)
    console.print(f"{id} {job.state}{_where(job.facts)}{'' if job.exit_status == 0 else f': {job.message}'}")
    return 1 if job.exit_status is None else job.exit_status


def what_next(server: JobServer, id: str) -> str:
    """How to follow, stop and find a job again."""
    ask = f"causalrm-ray submitted address={server.address}"
    return f"Follow it: {ask} id={id} follow=true; stop it: {ask} id={id} stop=true; see all: {ask}"


def _where(facts: Mapping[str, str]) -> str:
    return f", its run is {facts['run']}" if "run" in facts else ""
