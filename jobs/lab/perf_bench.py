"""The bench of `perf`: one case's models, options and roles, and two ways of doing the same work timed in alternation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from actors.cluster.wait import resolve
from actors.lab.perf_baselines import paused, processes_of, token_reward
from actors.system import Roles, start_roles
from causalrm_ray.checkpoint import atomic_folder
from causalrm_ray.config.options import validate
from causalrm_ray.config.perf import SAMPLES, Case, PerfConfig
from causalrm_ray.config.train import Config
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.report.speed import Pair
from causalrm_ray.types import Completion, Scored
from causalrm_ray.world.random_models import ensure_random_model
from jobs.support.oracle import Oracle
from jobs.support.progress import Progress
from jobs.support.prompts import Models, PromptSource
from jobs.train_policy import policy_step

PROMPT_TOKENS = 32  # room for the longest prompt and the end
WARM = 2  # steps of each side before it is measured


class Bench:
    """What one case is measured with. Roles start when a measurement first needs them."""

    def __init__(self, options: PerfConfig, case: Case, progress: Progress) -> None:
        self.options, self.case, self.progress = options, case, progress
        size, self.answers, self.tokens = case
        self.name = f"{size} {self.answers}x{self.tokens}"
        self.model = str(ensure_random_model(options.run.cache, size))
        self.config = self._loop_config()
        self.task, self.truth = PromptSource(self.config, Models(self.model, self.model)), Oracle(self.config)
        self.timeout_s = options.cluster.timeout_s

    @cached_property
    def loop(self) -> Roles:
        """All roles of the loop."""
        return self.start(self.config)

    def with_options(self, section: str, **changes: Any) -> Config:
        """The case's configuration with some options of a section changed."""
        tree = self.config.model_dump(mode="json")
        return validate(tree | {section: tree[section] | changes})

    def start(self, config: Config) -> Roles:
        """All roles of the loop under `config`, with an unfitted reward model."""
        roles = start_roles(config, self.model, self.model)
        folder = self.config.run.path / "reward" / "blank"
        scorer = SequenceScorer.from_pretrained(self.model)
        torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
        with atomic_folder(folder) as unfinished:
            scorer.save_pretrained(unfinished / "scorer", load_tokenizer(self.model))
        resolve(roles.reward.load.remote(folder / "scorer", 1), "load reward", self.timeout_s)
        roles.publish()
        return roles

    def step(self, roles: Roles, number: int, shown: bool = True, ahead: bool = False) -> float:
        """Seconds of a step of the real loop, which the users see if `shown` (see `policy_step`)."""
        return policy_step(self.task, self.truth, roles, number, shown=shown, ahead=ahead)["seconds"]

    def random_answers(self) -> list[Scored]:
        """A step's answers of uniformly random tokens, all of the full length."""
        rng, size = np.random.default_rng(0), len(load_tokenizer(self.model))
        logprobs = (-math.log(size),) * self.tokens
        answers = []
        for request in self.task.step_requests(0):
            tokens = tuple(rng.integers(size, size=self.tokens).tolist())
            answers.append(Scored(Completion(request.prompt, "", tokens, logprobs, "length", 0), token_reward(tokens), 1))
        return answers

    def interleave(
        self,
        ours: Callable[[], float],
        other: Callable[[], float],
        warm: int = WARM,
        roles: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
    ) -> list[Pair]:
        """Pairs of seconds, in alternating order. While one side works, the other's `roles` (ours, other) are paused."""

        def while_others_pause(work: Callable[[], float], own: Sequence[Any], others: Sequence[Any]) -> float:
            with paused(processes_of(others, self.timeout_s)):
                processes_of(own, self.timeout_s)  # all have resumed
                return work()

        ours = partial(while_others_pause, ours, *roles)
        other = partial(while_others_pause, other, *reversed(roles))
        for _ in range(warm):
            ours(), other()
        self.progress.tasks(f"pairs of {self.name}", self.options.pairs)
        pairs = []
        for number in range(self.options.pairs):
            pairs.append(Pair(ours(), other()) if number % 2 == 0 else Pair(*reversed((other(), ours()))))
            self.progress.task(number + 1, f"ours {pairs[-1].ours_s:.3f} s, other {pairs[-1].other_s:.3f} s")
        return pairs

    def _loop_config(self) -> Config:
        """GRPO with one optimizer step; all other options have their defaults."""
        options = self.options
        tree: dict[str, Any] = {
            "run": {"name": self.name.replace(" ", "-"), "dir": str(options.run.path), "cache": str(options.run.cache)},
            "cluster": options.cluster.model_dump(),
            "model": {"policy": self.model, "reward": self.model, "max_length": self.tokens + PROMPT_TOKENS},
            "rollout": {
                "engine": options.engine,
                "generators": options.generators,
                "prompts_per_step": self.answers // SAMPLES,
                "samples_per_prompt": SAMPLES,
                "max_new_tokens": self.tokens,
            },
            "learner": {
                "algorithm": "grpo",
                "ranks": options.ranks,
                "epochs": 1,
                "minibatches": 1,
                "lr": 1e-6,
                "kl": {"coefficient": 0.04},
            },
        }
        return validate(tree)
