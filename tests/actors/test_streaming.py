"""A rollout's stream and a refit without a cluster: real roles in this process, each object by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.cluster.in_process import Handle, enter_in_process
from actors.features.states import FeaturesActor
from actors.learner.group import LearnerGroup
from actors.learner.shares import Sharder, Share, StepShare
from actors.refitting import Refitter
from actors.reward.propensity_actor import PropensityActor
from actors.reward.report import RewardReport
from actors.reward.reward_actor import RewardActor
from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.rollout.generator_pool import Generators
from actors.streaming import RolloutStream
from causalrm_ray.config.options import validate
from causalrm_ray.config.train import Config, RewardConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.clean import CleanCounts, CleanSource
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.types import Completion, FeedbackEvent, Impression, Prompt, Request

TIMEOUT_S = 120.0
REQUESTS = [Request(Prompt(f"prompt-{number:02d}", Conversation.user("ask"), (3, 5 + number)), number) for number in range(20)]


class Scores:
    """Scores a row by its length, as version 7, and keeps the sizes of the micro-batches that it got."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[np.ndarray, int]:
        self.sizes.append(len(rows))
        return np.array([float(len(prompt) + len(answer)) for prompt, answer in rows], dtype=np.float32), 7


class Learns:
    """Keeps the ids that it prepared, and those that it was updated on."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.updated: list[str] = []

    def prepare(self, share: Share) -> None:
        self.prepared += share.ids

    def update(self, step: StepShare) -> dict[str, float]:
        self.updated = list(step.ids)
        return {"loss": 0.0}


class Reacts:
    """Upvotes everything."""

    def react_all(self, impressions: Sequence[Impression]) -> list[FeedbackEvent]:
        return [FeedbackEvent(f"{shown.id}/vote", shown.id, "upvote", 1.0, shown.time + 1) for shown in impressions]


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    with enter_in_process():
        yield


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rollout = {"engine": "hf", "generators": 1, "prompts_per_step": 20, "samples_per_prompt": 1, "max_new_tokens": 4}
    return validate({"run": {"dir": str(tmp_path)}, "rollout": rollout})


@pytest.fixture
def generators(config: Config, backbone: str, tmp_path: Path) -> Iterator[Generators]:
    settings = EngineSettings(backbone, 32, "float32", tmp_path, TIMEOUT_S, config.rollout.buffer)
    generator = Generator("hf", settings, config.rollout.sampling())
    yield Generators(config, {"generator-0": Handle(generator)}, lambda name: None, lambda message: None)
    generator.close()


def sharder(config: Config) -> Sharder:
    return Sharder(config.learner, ranks=1, seed=0, max_length=config.model.max_length)


def impression(done: Completion) -> Impression:
    return Impression(done.prompt.id, done.prompt.conversation, done.response or "-", done.policy_version, 0.0)


def test_a_rollout_is_scored_prepared_and_shown_in_micro_batches_and_comes_in_request_order(
    config: Config, generators: Generators, tmp_path: Path
) -> None:
    scores, learns, log = Scores(), Learns(), FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {"upvote": 1})
    learner = LearnerGroup([Handle(learns)], sharder(config), TIMEOUT_S)
    handles = {"reward": Handle(scores), "users": Handle(Reacts()), "log": Handle(log)}
    stream = RolloutStream(config.rollout, generators, learner, **handles, timeout_s=TIMEOUT_S)
    scored = stream.rollout(REQUESTS, lambda chunk: [impression(done) for done in chunk])
    assert [answer.completion.prompt.id for answer in scored] == [request.prompt.id for request in REQUESTS]
    for answer in scored:
        tokens = len(answer.completion.prompt.token_ids) + len(answer.completion.token_ids)
        assert (answer.reward, answer.reward_version) == (tokens, 7)
    assert scores.sizes == [8, 8, 4]  # rollout.micro_batch, and what is left
    assert sorted(learns.prepared) == [request.prompt.id for request in REQUESTS]
    assert log.position() == 40  # an impression and a vote each
    metrics = learner.update(scored)
    assert (metrics["loss"], metrics["reward_version"]) == (0.0, 7.0)
    assert metrics["response_length"] == np.mean([len(answer.completion.token_ids) for answer in scored])
    assert learns.updated == [request.prompt.id for request in REQUESTS]


def test_an_update_on_no_answers_is_refused(config: Config) -> None:
    learner = LearnerGroup([Handle(Learns())], sharder(config), TIMEOUT_S)
    with pytest.raises(ValueError, match="update needs an answer per minibatch, got 0 answers"):
        learner.update([])


def test_a_rollout_that_was_begun_must_be_the_next(config: Config, generators: Generators) -> None:
    stream = RolloutStream(
        config.rollout, generators, LearnerGroup([], sharder(config), TIMEOUT_S), reward=Handle(Scores()), timeout_s=TIMEOUT_S
    )
    stream.begin(REQUESTS[:4])
    with pytest.raises(RuntimeError, match="begun with prompt-00 must come first, got prompt-10"):
        stream.rollout(REQUESTS[10:], lambda chunk: [])
    stream.begin(REQUESTS[:4])
    assert len(stream.rollout(REQUESTS[:4], lambda chunk: [])) == 4


def test_the_log_is_filled_with_what_was_shown(config: Config, generators: Generators, tmp_path: Path) -> None:
    log = FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {"upvote": 1})
    handles = {"users": Handle(Reacts()), "log": Handle(log)}
    stream = RolloutStream(
        config.rollout, generators, LearnerGroup([], sharder(config), TIMEOUT_S), **handles, timeout_s=TIMEOUT_S
    )
    assert stream.fill_log(REQUESTS, lambda chunk: [impression(done) for done in chunk if done.prompt.id != "prompt-03"]) == 19
    assert log.position() == 38


def test_a_refit_promotes_its_first_model_and_is_due_again_once_the_log_has_grown(backbone: str, tmp_path: Path) -> None:
    log = FeedbackLog(f"sqlite:///{tmp_path / 'log.db'}", {"upvote": 1, "downvote": 0})
    shown = [
        Impression(
            f"i-{number}",
            Conversation.user("tell me about the lamp"),
            ("stone certainly", "stone never")[number % 2],
            0,
            float(number),
        )
        for number in range(300)
    ]
    votes = [
        FeedbackEvent(f"{one.id}/vote", one.id, "upvote" if "certainly" in one.response else "downvote", 1.0, one.time + 1)
        for number, one in enumerate(shown)
        if number % 3
    ]
    log.append(shown, votes)
    states = tmp_path / "states"
    features = FeaturesActor(backbone, states, max_length=64)
    propensity = PropensityActor(states, 0.1, seed=0, max_length=64)
    model = Backbone(backbone, model_digest(backbone), "final-last", "float32")
    options = {"max_length": 64, "seed": 0, "folder": tmp_path / "reward", "timeout_s": TIMEOUT_S, "cache": states}
    config = RewardConfig(method="naive", workers=0, epochs=1, rho=(0.1, 0.1))
    reward = RewardActor(model, config, **options)
    judged = "".join(f"i-{number},{number % 4 // 3}\n" for number in range(0, 300, 3))  # a quarter is liked
    (tmp_path / "judged.csv").write_text(f"impression,label\n{judged}gone,1\n", encoding="utf-8")
    clean = CleanSource(str(tmp_path / "judged.csv"))
    roles = {"features-0": Handle(features)}, Handle(propensity), Handle(reward)
    refitter = Refitter(Handle(log), *roles, tmp_path, TIMEOUT_S, clean)
    assert refitter.log_has_grown()
    fit = refitter.refit("first", None, ["naive"])
    assert not refitter.log_has_grown()
    assert (fit.clean, fit.reward.level["naive"].rows) == (CleanCounts(100, 1, "gone"), 100)
    assert fit.reward.level["naive"].liked == 0.25
    assert fit.reward.methods["naive"].figures["level_shift"] == fit.reward.level["naive"].shift < -0.2
    assert RewardReport.read(tmp_path / "reward" / "first") == fit.reward
    state = refitter.state()
    assert state["reward"] == {"folder": "reward/first/naive", "version": 1}
    assert state["propensity"] == "propensity/first"

    fresh = RewardActor(model, config, **options)
    propensity = PropensityActor(states, 0.1, seed=0, max_length=64)
    other = Refitter(Handle(log), {}, Handle(propensity), Handle(fresh), tmp_path, TIMEOUT_S)
    other.load(state)
    rows = [([3, 4], [5]), ([6], [7])]
    assert np.array_equal(fresh.score(rows)[0], reward.score(rows)[0])
    assert other.state() == state
