"""Weights by broadcast over gloo, from a learner of two ranks under ZeRO-3 to two vLLM generators, each in a process of its own.

The tests run in their order: the last leaves its generator dead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actors.system import Roles, start_roles
from actors.weights.publish import ByObject
from causalrm_ray.config.options import load_config
from causalrm_ray.config.train import Config
from causalrm_ray.conversation import Conversation
from causalrm_ray.types import Completion, Prompt, Request, Scored

BUCKET_BYTES = 16 << 10
TIMEOUT_S = 200.0
REQUESTS = [
    Request(Prompt(f"p{row:02}", Conversation.user("hi"), tuple(range(5 + row, 13 + row))), seed=row) for row in range(12)
]


@pytest.fixture(scope="module")
def model(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Llama of two layers whose output head is its embedding, so what is loaded last is read first."""
    folder = tmp_path_factory.mktemp("tied")
    shape = LlamaConfig.from_pretrained(backbone, num_hidden_layers=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    options = ["learner.ranks=2", "learner.zero_stage=3", "learner.algorithm=reinforce_pp", "learner.lr=0.02", "learner.epochs=1"]
    options += ["rollout.generators=2", "rollout.max_new_tokens=12", "model.max_length=32", f"cluster.timeout_s={TIMEOUT_S}"]
    return load_config(None, [*options, f"run.dir={tmp_path_factory.mktemp('runs')}"])


@pytest.fixture(scope="module")
def reported() -> list[str]:
    """What the driver was notified of roles that were replaced."""
    return []


@pytest.fixture(scope="module")
def roles(ray_cluster: None, config: Config, model: str, reported: list[str]) -> Iterator[Roles]:
    roles = start_roles(config, model, model, ("generators", "learner"), on_replacement=reported.append, transport="broadcast")
    roles.publisher.bucket_bytes = BUCKET_BYTES
    yield roles
    for role in (*roles.learner.ranks, *roles.generators.handles.values()):
        ray.kill(role)


def learn(roles: Roles, answers: list[Completion]) -> None:
    """One step, large enough to change answers."""
    scored = [Scored(done, float(number % 3), 0) for number, done in enumerate(answers)]
    roles.learner.prepare_step(scored, 8)
    roles.learner.update(scored)


def texts(answers: list[Completion]) -> list[tuple[int, ...]]:
    return [done.token_ids for done in answers]


def test_answers_after_a_broadcast_are_those_after_an_object(roles: Roles, model: str) -> None:
    answers = roles.stream.sample(REQUESTS)
    for version in (1, 2):  # the group is joined once
        learn(roles, answers)
        figures = roles.publish()
        previous, answers = answers, roles.stream.sample(REQUESTS)
        assert texts(answers) != texts(previous)
        assert {done.policy_version for done in answers} == {version}
        assert (roles.plan.transport, figures["sync_checksum_ok"]) == ("broadcast", 1.0)
    layout = ray.get(roles.learner.ranks[0].bucket_layout.remote(BUCKET_BYTES))
    assert len(layout.buckets) > 4
    whole = AutoModelForCausalLM.from_pretrained(model)
    assert figures["sync_bytes"] == layout.num_bytes == 4 * sum(parameter.numel() for parameter in whole.parameters())
    assert figures["sync_gb_per_s"] == pytest.approx(figures["sync_bytes"] / figures["sync_seconds"] / 1e9)

    reports = ByObject(roles.learner.ranks, adapter=False, timeout_s=TIMEOUT_S).publish(roles.generators.handles)
    assert [report.transport for report in reports.values()] == ["object", "object"]
    assert roles.stream.sample(REQUESTS) == answers


def test_requests_in_flight_go_on_with_broadcast_weights(roles: Roles) -> None:
    before = roles.stream.sample(REQUESTS)
    learn(roles, before)
    streams = [role.generate.options(num_returns="streaming").remote(REQUESTS) for role in roles.generators.handles.values()]
    roles.publish()
    for stream in streams:
        assert {ray.get(answer).prompt.id for answer in stream} == {request.prompt.id for request in REQUESTS}
    assert {done.policy_version for done in roles.stream.sample(REQUESTS)} == {before[0].policy_version + 1}


def test_what_cannot_receive_a_broadcast_is_refused_before_anything_starts(config: Config, model: str) -> None:
    hf = load_config(None, ["rollout.engine=hf", "learner.lora=2", f"run.dir={config.run.dir}"])
    with pytest.raises(
        ValueError,
        match=r"transport=broadcast needs a rollout\.engine that receives broadcasts, such as vllm, and learner\.lora=0",
    ):
        start_roles(hf, model, model, parts=("generators", "learner"), transport="broadcast")


def test_a_generator_that_dies_on_the_way_is_replaced_with_what_failed_beside_it(roles: Roles, reported: list[str]) -> None:
    def kill_at_bucket(learner: object, victim: int) -> None:
        from actors.weights.broadcast import BroadcastGroup

        start = BroadcastGroup.start

        def kill_and_start(channel: Any, tensor: torch.Tensor, phase: str) -> None:
            if phase.startswith("bucket 3 "):
                os.kill(victim, signal.SIGKILL)
                BroadcastGroup.start = start
            start(channel, tensor, phase)

        BroadcastGroup.start = kill_and_start

    begun = roles.generators.generate(REQUESTS)  # under the old weights, as an asynchronous run has it
    victim = ray.get(roles.generators.handles["generator-1"].__ray_call__.remote(lambda generator: os.getpid()))
    ray.get(roles.learner.ranks[0].__ray_call__.remote(kill_at_bucket, victim))
    figures = roles.publish()
    assert figures["sync_checksum_ok"] == 1.0
    assert reported == ["generator-1 died; another one takes its place (1 of loop.max_failures); generator-0 failed with it"]
    answered = [done.prompt.id for chunk in roles.generators.micro_batches(begun, roles.publisher) for done in chunk]
    assert sorted(answered) == [request.prompt.id for request in REQUESTS]
    assert len(reported) == 1  # what was begun knows of the replacement

    answers = roles.stream.sample(REQUESTS)
    ByObject(roles.learner.ranks, adapter=False, timeout_s=TIMEOUT_S).publish(roles.generators.handles)
    assert roles.stream.sample(REQUESTS) == answers


def test_a_generator_that_is_dead_before_a_group_meets_is_replaced_and_not_waited_for(roles: Roles, reported: list[str]) -> None:
    def kill(name: str) -> None:
        role = roles.generators.handles[name]
        os.kill(ray.get(role.__ray_call__.remote(lambda generator: os.getpid())), signal.SIGKILL)

    kill("generator-0")
    before = roles.stream.sample(REQUESTS)  # by another generator, which is in no group yet
    kill("generator-1")
    assert roles.publish()["sync_checksum_ok"] == 1.0
    assert [text.split(" died")[0] for text in reported[1:]] == ["generator-0", "generator-1"]
    assert roles.stream.sample(REQUESTS) == before


def test_a_bucket_damaged_on_its_way_is_refused_by_name_and_version(roles: Roles) -> None:
    def damage(generator: object) -> None:
        from actors.weights.broadcast import BroadcastGroup

        start, finish = BroadcastGroup.start, BroadcastGroup.finish

        def start_and_keep(channel: Any, tensor: torch.Tensor, phase: str) -> None:
            channel.kept = [*getattr(channel, "kept", []), (phase, tensor)]
            start(channel, tensor, phase)

        def finish_and_flip(channel: Any) -> None:
            finish(channel)
            phase, tensor = channel.kept.pop(0)
            if phase.startswith("bucket 2 "):
                tensor.view(torch.int32)[0] ^= 1

        BroadcastGroup.start, BroadcastGroup.finish = start_and_keep, finish_and_flip

    ray.get(roles.generators.handles["generator-1"].__ray_call__.remote(damage))
    with pytest.raises(
        RuntimeError, match=r"\(generator-1\): .*must sum to the sender\W+s 0x\w+ for version \d, got 0x"
    ) as refused:
        roles.publish()
    assert "generator-0" not in str(refused.value)
