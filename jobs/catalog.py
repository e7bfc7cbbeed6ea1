"""The jobs by name: what each is for, and where its code and its options are. Importing this loads none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from causalrm_ray.config.base import Section
from causalrm_ray.registry import import_path

MAIN = "causalrm_ray.config.train:Config"
RunUse = Literal["writes", "supervises", "reads", "none"]


@dataclass(frozen=True)
class Job:
    """One job.

    `module` holds its `run(config)`, and `tree` is the import path of its options. `sections` are those that it is about, which
    its help lists first. `uses_run` says what it does with runs/<run.name>: the command line locks the folder for a job that
    "writes" it; one that "supervises" leaves lock and log to the driver that it starts; one that "reads" works under the options
    that the run was started with; "none" has no run.
    """

    group: str
    meaning: str
    module: str
    tree: str = MAIN
    sections: tuple[str, ...] = ()
    uses_run: RunUse = "writes"

    def options(self) -> type[Section]:
        """The class of its options."""
        return import_path(self.tree, "configuration")

    def run(self, config: Section) -> int:
        """Import the job and run it. Returns its exit status."""
        return import_module(self.module).run(config)


_LEARN, _MEASURE, _OPERATE = "Learn from feedback", "Measure", "Prepare and operate"
JOBS = {
    "train-policy": Job(
        _LEARN, "tune a policy on observational feedback, end to end", "jobs.support.supervise", uses_run="supervises"
    ),
    "fit-reward": Job(
        _LEARN, "feedback log in, reward model out", "jobs.fit_reward", sections=("run", "feedback", "model", "reward")
    ),
    "simulate-feedback": Job(
        _LEARN,
        "let simulated users react to a policy's answers; write the log",
        "jobs.simulate_feedback",
        sections=("run", "world", "feedback", "model", "rollout"),
    ),
    "evaluate": Job(
        _LEARN,
        "score a policy and a reward model against the embedded oracle",
        "jobs.evaluate",
        sections=("run", "model", "rollout", "loop"),
    ),
    "replay": Job(
        _MEASURE,
        "train the learner alone on what a run kept, from its checkpoint, and compare",
        "jobs.replay",
        sections=("run", "learner"),
        uses_run="reads",
    ),
    "compare": Job(
        _MEASURE,
        "tune policies on several reward models, for both kinds of users, over seeds",
        "jobs.lab.compare",
        sections=("run", "reward", "world"),
    ),
    "benchmark": Job(
        _MEASURE,
        "methods on a graded data set whose feedback is simulated, over settings",
        "jobs.lab.benchmark",
        "causalrm_ray.config.benchmark:BenchmarkConfig",
    ),
    "noise-study": Job(
        _MEASURE,
        "estimated rates of label noise and their intervals on simulated logs, against the truth",
        "jobs.lab.noise_study",
        "causalrm_ray.config.benchmark:NoiseStudyConfig",
    ),
    "perf": Job(
        _MEASURE,
        "how fast every part of a step is, against the same work done without us",
        "jobs.lab.perf",
        "causalrm_ray.config.perf:PerfConfig",
    ),
    "chaos": Job(
        _MEASURE,
        "kill roles, drivers and nodes of a small run, and audit what is left of it",
        "jobs.lab.chaos",
        "causalrm_ray.config.chaos:ChaosConfig",
    ),
    "doctor": Job(
        _OPERATE,
        "versions, devices, Ray, engines, and what to install",
        "jobs.doctor",
        sections=("cluster", "rollout"),
        uses_run="none",
    ),
    "plan": Job(
        _OPERATE,
        "memory, time and cost of a training run on given GPUs, and what is slowest",
        "jobs.plan",
        "causalrm_ray.config.plan:PlanConfig",
    ),
    "embed": Job(
        _OPERATE,
        "a graded data set through a frozen backbone: embeddings for the benchmark",
        "jobs.embed",
        "causalrm_ray.config.embed:EmbedConfig",
    ),
    "submit": Job(
        _OPERATE,
        "let a cluster run another job, and follow it: submit <job> key=value ...",
        "jobs.submit",
        "causalrm_ray.config.submit:SubmitConfig",
        uses_run="none",
    ),
    "submitted": Job(
        _OPERATE,
        "what was submitted to a cluster: states, logs, files; stop one",
        "jobs.submitted",
        "causalrm_ray.config.submit:SubmittedConfig",
        uses_run="none",
    ),
}
