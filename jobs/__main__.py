"""`causalrm-ray <job> [--config FILE] [key=value ...]`, the same as `python -m jobs <job> ...`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from causalrm_ray.config.base import Section
from causalrm_ray.config.options import find_run, load_tree
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError
from jobs.catalog import GROUPS, JOBS, Job
from jobs.support.errors import discarding_refused_import, naming_full_disks, refuse
from jobs.support.lock import check_writable, run_lock
from jobs.support.option_tables import option_tables

HELP = {"help_option_names": ["-h", "--help"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit status: 0 done, 1 failed checks, 2 a configuration or input that cannot run."""
    try:
        app(None if argv is None else list(argv), prog_name="causalrm-ray")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def start(name: str, file: Path | None, overrides: Sequence[str]) -> int:
    """Run the job `name` under the options of a file and of the command line. Returns its exit status."""
    job = JOBS[name]
    try:
        if name == "submit":  # its command line holds that of another job
            from jobs.submit import submit

            return submit(file, overrides)
        config = read_options(name, job, file, overrides)
        with _run_folder(job, config):
            return job.run(config)
    except (ConfigError, InputError) as error:
        return refuse(name, error)


def read_options(name: str, job: Job, file: Path | None, overrides: Sequence[str]) -> Section:
    """The job's options. A run that is continued or replayed keeps those that it was started with, but for `overrides`."""
    tree = job.options()
    defaults = [f"run.name={name}"] if "run" in tree.model_fields else []
    run = find_run(tree, file, overrides, defaults)
    if run.resume or job.uses_run == "reads":
        file, defaults = run.path / "config.yaml", []
        if not file.exists():
            raise InputError(f"{'run.name' if job.uses_run == 'reads' else 'resume=true'}: {run.path} holds no run")
    return load_tree(tree, file, overrides, defaults)


@contextlib.contextmanager
def _run_folder(job: Job, config: Section) -> Iterator[None]:
    """While the block lasts, the run's folder is this process's, if the job writes it; errors name a folder that cannot be
    written, or a full disk."""
    run = getattr(config, "run", None)
    learning = config if isinstance(config, Config) and job.uses_run == "writes" else None
    with contextlib.ExitStack() as held:
        if run is not None and job.uses_run == "writes":
            held.enter_context(run_lock(run))
        elif run is not None:
            check_writable("run.cache", run.cache)
        if learning:
            from jobs.support.log import run_log  # only now: it loads Ray

            held.enter_context(run_log(learning.run))
        if run is not None:
            held.enter_context(naming_full_disks(run))
        if learning:
            held.enter_context(discarding_refused_import(learning))
        yield


class JobCommand(TyperCommand):
    """A job, whose help ends with its options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage and meaning, then a table of options for each section; only now is the job's configuration loaded."""
        super().format_help(ctx, formatter)
        job, console = JOBS[str(self.name)], Console(highlight=False)
        for table in option_tables(job.options(), job.sections):
            console.print(table)


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    subcommand_metavar="<job> [--config FILE] [key=value ...]",
    context_settings=HELP,
    epilog="`causalrm-ray <job> --help` lists the job's options.",
)


@app.callback()
def _without_job(
    context: typer.Context, version_wanted: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """Tune language models on the feedback that users choose to give."""
    if version_wanted:
        typer.echo(f"causalrm-ray {version('causalrm-ray')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _job(
    context: typer.Context,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", hidden=True)] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of options; those on the command line win.")
    ] = None,
) -> None:
    raise typer.Exit(start(str(context.command.name), config, overrides or []))


for _group, _jobs in GROUPS.items():
    for _name, _entry in _jobs.items():
        app.command(_name, cls=JobCommand, help=_entry.meaning, rich_help_panel=_group, context_settings=HELP)(_job)


if __name__ == "__main__":
    sys.exit(main())
