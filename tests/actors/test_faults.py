"""Roles are killed with -9 and nothing is lost, on real actors with transformers' engine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch

from actors.cluster.place import Placement, place
from actors.cluster.wait import resolve
from actors.errors import RoleDiedError
from actors.lab.perf_baselines import processes_of
from actors.learner.group import LearnerGroup
from actors.learner.shares import Sharder, Share, StepShare
from actors.reward.reward_actor import RewardActor
from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.rollout.generator_pool import Generators
from actors.rollout.hf_engine import HfEngine
from actors.streaming import RolloutStream
from causalrm_ray.checkpoint import atomic_folder
from causalrm_ray.config.options import validate
from causalrm_ray.config.train import Config, RewardConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import Completion, Prompt, Request

TIMEOUT_S = 120.0
REQUESTS = [
    Request(Prompt(f"prompt-{number}", Conversation.user("hi"), (3, 5 + number % 40)), number) for number in range(800)
]  # a stream is held back
# before half of a generator's answers are read: none has ended when its generator is killed


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rollout = {"engine": "hf", "generators": 2, "prompts_per_step": 400, "samples_per_prompt": 2, "max_new_tokens": 6}
    return validate({"run": {"dir": str(tmp_path)}, "rollout": rollout, "loop": {"max_failures": 2}})


def kill(role: Any) -> None:
    (process,) = processes_of([role], TIMEOUT_S)
    process.kill()


def in_order(answers: Sequence[Completion]) -> list[Completion]:
    return sorted(answers, key=lambda answer: int(answer.prompt.id.removeprefix("prompt-")))


@pytest.mark.usefixtures("ray_cluster")
def test_another_generator_answers_what_a_killed_one_had_not(config: Config, backbone: str, tmp_path: Path) -> None:
    rollout, reported = config.rollout, []

    def start(name: str) -> Any:
        settings = EngineSettings(backbone, 32, "float32", tmp_path, TIMEOUT_S, rollout.buffer)
        placement = Placement(name, env=HfEngine.process_env(backbone, tmp_path, gpu=False), concurrency=2)
        return place(Generator, placement, "hf", settings, rollout.sampling())

    handles = {name: start(name) for name in ("generator-0", "generator-1")}
    generators = Generators(config, handles, start, reported.append)
    undisturbed = [answer for chunk in generators.micro_batches(generators.generate(REQUESTS), None) for answer in chunk]
    assert [answer.prompt.id for answer in in_order(undisturbed)] == [request.prompt.id for request in REQUESTS]

    chunks = generators.micro_batches(generators.generate(REQUESTS), None)
    answers = list(next(chunks))
    kill(generators.handles["generator-1"])
    answers += [answer for chunk in chunks for answer in chunk]
    assert reported == ["generator-1 died; another one takes its place (1 of loop.max_failures)"]
    for found, expected in zip(in_order(answers), in_order(undisturbed), strict=True):
        assert (found.prompt.id, found.token_ids) == (expected.prompt.id, expected.token_ids)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)  # others share its batches now

    def exhaust_memory_in_third_step(generator: Any) -> None:  # of the six that most answers take
        core, steps = generator._engine._core, itertools.count(1)
        step = core.step

        def fails() -> Any:
            if next(steps) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step()

        core.step = fails

    ray.get(generators.handles["generator-0"].__ray_call__.remote(exhaust_memory_in_third_step), timeout=TIMEOUT_S)
    chunks = generators.micro_batches(generators.generate(REQUESTS), None)
    answers = [answer for chunk in chunks for answer in chunk]  # its process lives, its engine is dead
    assert reported[1:] == ["generator-0 died; another one takes its place (2 of loop.max_failures)"]
    assert [answer.prompt.id for answer in in_order(answers)] == [request.prompt.id for request in REQUESTS]

    chunks = generators.micro_batches(generators.generate(REQUESTS), None)
    next(chunks)
    kill(generators.handles["generator-0"])
    with pytest.raises(RoleDiedError, match=r"generate \(generator-0\): the process of generator-0 died"):
        list(chunks)


class Scores:
    """Stands for the reward role."""

    def score(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
        return np.zeros(len(rows)), 1


class Learns:
    """Stands for a rank that prepares until somebody opens `gate`, a named pipe, and then fails."""

    def __init__(self, gate: Path) -> None:
        self._gate = gate

    def prepare(self, share: Share) -> None:
        self._gate.read_text()
        raise ValueError(f"cannot prepare {share.ids[0]}")

    def update(self, step: StepShare) -> dict[str, float]:
        raise ValueError("never prepared")


class Writes:
    """Stands for the generators."""

    def generate(self, requests: Sequence[Request]) -> Sequence[Request]:
        return requests

    def micro_batches(self, calls: Sequence[Request], publisher: Any) -> Iterator[list[Completion]]:
        yield [Completion(request.prompt, "", (5,), (-1.0,), "stop", 0) for request in calls]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("dies", [False, True])
def test_a_rollout_ends_before_the_learner_is_prepared_and_the_update_hears_of_it(
    config: Config, tmp_path: Path, dies: bool
) -> None:
    os.mkfifo(gate := tmp_path / "gate")
    sharder = Sharder(config.learner, ranks=1, seed=0, max_length=config.model.max_length)
    learner = LearnerGroup([place(Learns, Placement("learner-0"), gate)], sharder, TIMEOUT_S)
    reward = place(Scores, Placement())
    stream = RolloutStream(config.rollout, cast(Generators, Writes()), learner, reward=reward, timeout_s=TIMEOUT_S)
    (rank,) = processes_of(learner.ranks, TIMEOUT_S)
    scored = stream.rollout(REQUESTS[:2], lambda done: [])  # nobody has opened the gate
    assert [answer.completion.prompt.id for answer in scored] == ["prompt-0", "prompt-1"]
    if dies:
        rank.kill()
        with pytest.raises(RoleDiedError, match="prepare answers: the process of learner-0 died"):
            learner.update(scored)
    else:
        gate.write_text("")
        with pytest.raises(ValueError, match="cannot prepare prompt-0"):
            learner.update(scored)


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_reward_role_comes_back_with_the_version_that_it_served(backbone: str, tmp_path: Path) -> None:
    scorer = SequenceScorer.from_pretrained(backbone)
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    with atomic_folder(tmp_path / "candidate") as draft:
        scorer.save_pretrained(draft / "auto", load_tokenizer(backbone))
    options = {"max_length": 32, "seed": 0, "folder": tmp_path, "timeout_s": TIMEOUT_S, "cache": tmp_path}
    model = Backbone(backbone, model_digest(backbone), "final-last", "float32")
    role = place(RewardActor, Placement("reward", restarts=1), model, RewardConfig(), **options)
    resolve(role.load.remote(tmp_path / "candidate" / "auto", 7), "load", TIMEOUT_S)
    rows = [([3, 4], [5]), ([6], [7])]
    before, _ = resolve(role.score.remote(rows), "score", TIMEOUT_S)
    kill(role)
    after, version = resolve(role.score.remote(rows), "score", TIMEOUT_S)
    assert version == 7
    assert np.array_equal(after, before)
    kill(role)
    with pytest.raises(RoleDiedError, match="score: the process of reward died"):
        resolve(role.score.remote(rows), "score", TIMEOUT_S)
