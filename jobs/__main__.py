"""`causalrm-ray <job> [--config FILE] [key=value ...]`, the same as `python -m jobs <job> ...`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from rich.console import Console
from rich.table import Table

from causalrm_ray.config.base import RunFolder, Section
from causalrm_ray.config.benchmark import BenchmarkConfig, NoiseStudyConfig
from causalrm_ray.config.chaos import ChaosConfig
from causalrm_ray.config.embed import EmbedConfig
from causalrm_ray.config.options import find_run, load_tree, options
from causalrm_ray.config.perf import PerfConfig
from causalrm_ray.config.plan import PlanConfig
from causalrm_ray.config.submit import SubmitConfig, SubmittedConfig
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError
from jobs.support import supervise
from jobs.support.errors import naming_full_disks, refuse
from jobs.support.lock import run_lock


class Job(NamedTuple):
    """A job: the module whose `run(config)` does it, what it is for, the tree of its options, whether it writes a run,
    whether it `revisits` one, whose options then hold, and whether it is `supervised`: its driver is a process of its own, which
    holds the run's lock and writes its log.
    """

    module: str
    meaning: str
    tree: type[Section] = Config
    writes: bool = True
    revisits: bool = False
    supervised: bool = False


JOBS = {
    "train-policy": Job("jobs.train_policy", "tune a policy on observational feedback, end to end", supervised=True),
    "fit-reward": Job("jobs.fit_reward", "feedback log in, reward model out"),
    "simulate-feedback": Job("jobs.simulate_feedback", "let simulated users react to a policy's answers; write the log"),
    "evaluate": Job("jobs.evaluate", "score a policy and a reward model against the embedded oracle"),
    "compare": Job("jobs.lab.compare", "tune policies on several reward models, for both kinds of users, over seeds"),
    "benchmark": Job(
        "jobs.lab.benchmark", "methods on a graded data set whose feedback is simulated, over settings", BenchmarkConfig
    ),
    "noise-study": Job(
        "jobs.lab.noise_study",
        "estimated rates of slips and their intervals on simulated logs, against the truth",
        NoiseStudyConfig,
    ),
    "embed": Job("jobs.embed", "a graded data set through a frozen backbone: embeddings for the benchmark", EmbedConfig),
    "replay": Job(
        "jobs.replay", "train the learner alone on what a run kept, from its checkpoint, and compare", writes=False, revisits=True
    ),
    "perf": Job("jobs.lab.perf", "how fast every part of a step is, against the same work done without us", PerfConfig),
    "chaos": Job("jobs.lab.chaos", "kill roles, drivers and nodes of a small run, and audit what is left of it", ChaosConfig),
    "plan": Job("jobs.plan", "memory, time and cost of a training run on given GPUs, and what is slowest", PlanConfig),
    "submit": Job(
        "jobs.submit", "let a cluster run one of the other jobs: submit <job> [key=value ...]", SubmitConfig, writes=False
    ),
    "submitted": Job(
        "jobs.submitted", "what was submitted to a cluster: states, logs, files; stop one", SubmittedConfig, writes=False
    ),
    "doctor": Job("jobs.doctor", "versions, devices, Ray, engines, and what to install", writes=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit status: 0 done, 1 failed checks, 2 a configuration or input that cannot run."""
    arguments = _parser().parse_intermixed_args(argv)
    job = JOBS[arguments.job]
    if arguments.help:
        print_help(arguments.job)
        return 0
    try:
        if arguments.job == "submit":
            submission = make_submission(arguments.config, arguments.overrides)
            return importlib.import_module(job.module).run(*submission)
        file, defaults = arguments.config, [f"run.name={arguments.job}"] if "run" in job.tree.model_fields else []
        run = find_run(job.tree, file, arguments.overrides, defaults)
        if run.resume or job.revisits:  # what the run was told at its start holds, but for what is said now
            file, defaults = run.path / "config.yaml", []
            if not file.exists():
                raise InputError(f"{'run.name' if job.revisits else 'resume=true'}: {run.path} holds no run")
        config = load_tree(job.tree, file, arguments.overrides, defaults)
        run = find_run(job.tree, file, arguments.overrides, defaults)
        lock = run_lock(run) if job.writes and not job.supervised else contextlib.nullcontext()
        with lock, _logged(job, run), naming_full_disks(run):
            if job.supervised:
                return supervise.run(cast(Config, config), job.module)
            return importlib.import_module(job.module).run(config)
    except (ConfigError, InputError) as error:
        return refuse(arguments.job, error)


def _logged(job: Job, run: RunFolder) -> contextlib.AbstractContextManager[object]:
    """The log of a run of the main tree, loaded only now: `--help` need not wait for Ray."""
    if not job.writes or job.supervised or job.tree is not Config:
        return contextlib.nullcontext()
    return importlib.import_module("jobs.support.log").RunLog(run)


class SubmissionRequest(NamedTuple):
    """What to hand over and how, the command line of the job in the cluster, and what to keep with it."""

    config: SubmitConfig
    command: list[str]
    facts: dict[str, str]


def make_submission(file: str | None, words: Sequence[str]) -> SubmissionRequest:
    """What `words` and the job's `file` ask a cluster to do: the job, its options and those of `submit`, all checked here.

    The job joins the cluster that it runs in, unless told otherwise. Raises ConfigError.
    """
    config = load_tree(SubmitConfig, None, [word for word in words if word.startswith("submit.")])
    name, *overrides = [word for word in words if not word.startswith("submit.")] or [""]
    able = [known for known, job in JOBS.items() if "cluster" in job.tree.model_fields]
    if name not in able:
        raise ConfigError(f"submit needs a job, one of {', '.join(able)}, got {name!r}")
    job, defaults = JOBS[name], [f"run.name={name}"]
    run = find_run(job.tree, file, overrides, defaults)
    if (job.writes or job.revisits) and not run.dir.expanduser().is_absolute():
        raise ConfigError(
            f"run.dir must be an absolute folder on storage that all nodes share, got {run.dir}: a submitted job's own is lost"
        )
    command = ["python", "-m", "jobs", name, *overrides]
    if file:
        command += ["--config", _inside(config.submit.working_dir, file)]
    if run.resume or job.revisits:  # the other options lie with the run, where the cluster sees them
        told = any(word.startswith(("cluster.address=", "address=")) for word in overrides)
    else:
        told = load_tree(job.tree, file, overrides, defaults).model_dump()["cluster"]["address"] is not None
    facts = {"job": name} | ({"run": str(run.dir / run.name)} if job.writes or job.revisits else {})
    return SubmissionRequest(config, command if told else [*command, "cluster.address=auto"], facts)


def _inside(folder: Path, file: str) -> str:
    """The path of `file` in `folder`, which is sent to the cluster."""
    try:
        return str(Path(file).resolve().relative_to(folder.resolve()))
    except ValueError:
        raise ConfigError(f"--config must lie in submit.working_dir={folder}, which the job is sent with, got {file}") from None


def print_help(job: str) -> None:
    """Every option with its type, default and meaning."""
    console = Console()
    console.print(
        f"causalrm-ray {job}: {JOBS[job].meaning}\n\nusage: causalrm-ray {job} [--config FILE] [key=value ...]\n",
        markup=False,
        highlight=False,
    )
    table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
    for key, kind, default, text in options(JOBS[job].tree):
        table.add_row(f"[cyan]{key}[/]", kind, str(default), text)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    jobs = "\n".join(f"  {name:18} {job.meaning}" for name, job in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="causalrm-ray",
        usage="causalrm-ray <job> [--config FILE] [key=value ...]",
        description=f"jobs:\n{jobs}\n\n`causalrm-ray <job> --help` lists every option.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file; overrides on the command line win")
    parser.add_argument("-h", "--help", action="store_true", help="list every option of the job")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
