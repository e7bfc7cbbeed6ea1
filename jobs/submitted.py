"""Submitted jobs: the state of all, or of one with its run's files where this machine can see them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.cluster.job_server import JobServer, Submission
from causalrm_ray.config.submit import SubmittedConfig
from jobs.submit import follow

console = Console(highlight=False, markup=False, soft_wrap=True)


def run(config: SubmittedConfig) -> int:
    """Run the job. Returns 0; with `follow` the exit status of the job that was followed."""
    server = JobServer(config.address)
    if config.id is None:
        _show_all(server.all())
        return 0
    if config.follow:
        return follow(server, config.id)
    if config.stop:
        console.print(f"{config.id} {'is being stopped' if server.stop(config.id) else 'had ended already'}")
        return 0
    _show(server.look(config.id))
    return 0


def _show_all(submissions: list[Submission]) -> None:
    table = Table("id", "state", "started", "run", "command", box=None, pad_edge=False)
    for job in submissions:
        table.add_row(
            job.id, job.state, f"{job.start:%Y-%m-%d %H:%M:%S}" if job.start else "", job.facts.get("run", ""), job.command
        )
    console.print(table)


def _show(job: Submission) -> None:
    status = "" if job.exit_status is None else f", exit status {job.exit_status}"
    times = ", ".join(f"{word} {time:%Y-%m-%d %H:%M:%S %Z}" for word, time in (("from", job.start), ("to", job.end)) if time)
    console.print(f"{job.id} {job.state}{status}, {times}\n{job.command}\n{job.message}")
    if "run" not in job.facts:
        return
    folder = Path(job.facts["run"]).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    console.print(f"run: {folder}" if files else f"run: {folder}, which is empty or cannot be seen from here")
    for file in files:
        console.print(f"  {file.name}{'/' if file.is_dir() else f'  {file.stat().st_size} bytes'}")
