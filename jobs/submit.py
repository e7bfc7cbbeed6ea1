"""Let a cluster run a job, follow its log, and end as it does. Ctrl-C ends the following only."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Mapping, Sequence

from rich.console import Console

from actors.cluster.job_server import JobServer
from causalrm_ray.config.submit import SubmitConfig
from causalrm_ray.errors import InputError

console = Console(highlight=False, markup=False, soft_wrap=True)


def run(config: SubmitConfig, command: Sequence[str], facts: Mapping[str, str]) -> int:
    """Submit `command`, which knows all its options. `facts` are kept with it. Returns its exit status, or 0 if not followed."""
    options = config.submit
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise InputError(f"submit.env: not set here: {', '.join(missing)}")
    server = JobServer(options.address)
    env = {name: os.environ[name] for name in options.env}
    id = server.submit(command, options.working_dir, env, facts, options.id)
    console.print(f"submitted {id} to {server.address}: {shlex.join(command)}")
    if options.follow:
        return follow(server, id)
    console.print(what_next(server, id))
    return 0


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
