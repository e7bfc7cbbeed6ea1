"""The jobs by name: what each is for, and where its code and its options are. Importing this loads none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from causalrm_ray.config.base import Section
from causalrm_ray.registry import import_path

MAIN = "train:Config"
RunUse = Literal["writes", "supervises", "reads", "none"]


@dataclass(frozen=True)
class Job:
    """One job.

    `module` holds its `run(config)`, and `tree` the class of its options, below causalrm_ray.config; `sections` are those that
    its help lists first. `uses_run` says what it does with runs/<run.name>: the command line locks the folder for a job that
    "writes" it; one that "supervises" leaves lock and log to the driver that it starts; one that "reads" works under the options
    that the run was started with; "none" has no run.
    """

    module: str
    meaning: str
    tree: str = MAIN
    sections: tuple[str, ...] = ()
    uses_run: RunUse = "writes"

    def options(self) -> type[Section]:
        """The class of its options."""
        return import_path(f"causalrm_ray.config.{self.tree}", "configuration")

    def run(self, config: Section) -> int:
        """Import the job and run it. Returns its exit status."""
        return import_module(self.module).run(config)


_FIT = ("run", "feedback", "model", "reward")
_SIMULATE = ("run", "world", "feedback", "model", "rollout")
_SCORE = ("run", "model", "rollout", "loop")
GROUPS = {
    "Learn from feedback": {
        "train-policy": Job(
            "jobs.support.supervise", "tune a policy on observational feedback, end to end", uses_run="supervises"
        ),
        "fit-reward": Job("jobs.fit_reward", "feedback log in, reward model out", MAIN, _FIT),
        "simulate-feedback": Job("jobs.simulate_feedback", "simulated users react to a policy's answers: a log", MAIN, _SIMULATE),
        "evaluate": Job("jobs.evaluate", "a policy and a reward model against the embedded oracle", MAIN, _SCORE),
    },
    "Measure": {
        "replay": Job(
            "jobs.replay", "train the learner alone on what a run kept, and compare", MAIN, ("run", "learner"), "reads"
        ),
        "compare": Job("jobs.lab.compare", "tune policies on several reward models, over users and seeds", MAIN, _FIT),
        "benchmark": Job(
            "jobs.lab.benchmark", "methods on a graded data set whose feedback is simulated", "benchmark:BenchmarkConfig"
        ),
        "noise-study": Job(
            "jobs.lab.noise_study", "estimated rates of label noise against the truth", "benchmark:NoiseStudyConfig"
        ),
        "perf": Job("jobs.lab.perf", "speed of every part of a step, against the same work without us", "perf:PerfConfig"),
        "families": Job(
            "jobs.lab.families.job", "tiny models of every family through engines, learner, reward", "families:FamiliesConfig"
        ),
        "chaos": Job("jobs.lab.chaos", "kill roles, drivers and nodes of a small run, and audit the rest", "chaos:ChaosConfig"),
    },
    "Prepare and operate": {
        "check-log": Job(
            "jobs.log.check_log", "what a log holds, what is not read and why", "check:CheckConfig", ("feedback", "model"), "none"
        ),
        "forget": Job("jobs.log.forget", "erase a user, or an impression, from a log and a run's folder", "forget:ForgetConfig"),
        "doctor": Job(
            "jobs.doctor",
            "versions, devices, Ray, what to install; with model=PATH, whether it works",
            MAIN,
            ("cluster", "model"),
            "none",
        ),
        "plan": Job("jobs.plan", "memory, time and cost of a training run, and what is slowest", "plan:PlanConfig"),
        "embed": Job("jobs.embed", "a graded data set through a frozen backbone, for the benchmark", "embed:EmbedConfig"),
        "submit": Job(
            "jobs.submit", "run another job on a cluster: submit <job> key=value ...", "submit:SubmitConfig", (), "none"
        ),
        "submitted": Job("jobs.submitted", "submitted jobs: states, logs, files; stop one", "submit:SubmittedConfig", (), "none"),
    },
}
JOBS: dict[str, Job] = {name: job for jobs in GROUPS.values() for name, job in jobs.items()}
