"""How the driver distributes a step's answers over ranks: who gets what, once, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from learner_scenarios import NARROW, make_groups, make_step

from actors.learner.shares import Sharder, Share, StepShare, answer_metrics, groups_of
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.types import Completion, Prompt, Scored, Span

MAX_LENGTH = 32


def sharder(ranks: int = 2, **options: object) -> Sharder:
    config = LearnerConfig(**{"epochs": 2, "minibatches": 2} | options)
    return Sharder(config, ranks=ranks, seed=5, max_length=MAX_LENGTH, tokens_per_micro_batch=NARROW)


def completions(scored: list[Scored]) -> list[Completion]:
    return [answer.completion for answer in scored]


def whole_step(scored: list[Scored], ranks: int, **options: object) -> tuple[list[Share], list[StepShare]]:
    found = sharder(ranks, **options)
    return found.split(completions(scored)), found.step(scored)


def test_each_answer_goes_to_one_rank_once_to_the_bit_and_as_many_tokens_to_each() -> None:
    scored = make_step(0)
    by_id = {answer.completion.prompt.id: answer.completion for answer in scored}
    shares, _ = whole_step(scored, 3)
    assert sorted(itertools.chain(*(share.ids for share in shares))) == sorted(by_id)
    for share in shares:
        assert (share.tokens.dtype, share.logprobs.dtype) == (np.int32, np.float32)
        for name, answer in zip(share.ids, share.answers(), strict=True):
            given = by_id[name]
            assert tuple(answer.row.prompt.tolist()) == given.prompt.token_ids
            assert tuple(answer.row.answer.tolist()) == given.token_ids
            assert answer.logprobs_R.tolist() == np.array(given.logprobs, dtype=np.float32).tolist()
            assert answer.truncated == (given.stop_reason == "length")
    tokens = [len(share.tokens) for share in shares]
    assert max(tokens) - min(tokens) <= max(len(done.prompt.token_ids) + len(done.token_ids) for done in by_id.values())


@pytest.mark.parametrize("truncation", ["mask", 1.0])
def test_every_epoch_trains_on_each_answer_once_in_as_many_micro_batches_on_each_rank(truncation: float | str) -> None:
    scored = make_step(0)
    trained = [a.completion.prompt.id for a in scored if truncation != "mask" or a.completion.stop_reason != "length"]
    _, steps = whole_step(scored, 2, truncation=truncation)
    assert [len(step.minibatches) for step in steps] == [4, 4]
    for epoch in (0, 2):
        seen = [
            step.ids[row]
            for step in steps
            for minibatch in step.minibatches[epoch : epoch + 2]
            for batch in minibatch.batches
            for row in batch
        ]
        assert sorted(seen) == sorted(trained)
    lengths = {answer.completion.prompt.id: len(answer.completion.token_ids) for answer in scored}
    for one, other in zip(*(step.minibatches for step in steps), strict=True):
        assert (one.answers, one.tokens, len(one.batches)) == (other.answers, other.tokens, len(other.batches))
        names = [step.ids[row] for step, own in zip(steps, (one, other), strict=True) for batch in own.batches for row in batch]
        assert (one.answers, one.tokens) == (len(names), sum(lengths[name] for name in names))
    assert max(len(batches) for step in steps for batches in (step.minibatches[0].batches,)) > 1


def test_a_step_holds_all_rewards_and_groups_but_only_its_own_ids() -> None:
    scored = make_groups(0)
    _, steps = whole_step(scored, 2, algorithm="grpo")
    for step in steps:
        assert step.rewards.tolist() == [answer.reward for answer in scored]
        assert step.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 4
        assert step.ids == tuple(scored[place].completion.prompt.id for place in step.places)
        assert step.longest == max(len(answer.completion.token_ids) for answer in scored)


def test_minibatches_depend_on_seed_version_and_epoch_only() -> None:
    scored = make_step(0)
    orders = []
    for version in (0, 1):
        found = sharder(ranks=1)
        found.restart(version)
        now = [replace(answer, completion=replace(answer.completion, policy_version=version)) for answer in scored]
        found.split(completions(now))
        (step,) = found.step(now)
        assert found.version == version + 1
        orders.append([sorted(row for batch in minibatch.batches for row in batch) for minibatch in step.minibatches])
    expected = np.random.default_rng(np.random.SeedSequence([5, 0, 1])).permutation(13)
    assert orders[0][2:] == [sorted(part.tolist()) for part in np.array_split(expected, 2)]
    assert orders[0] != orders[1]


def test_answers_to_prompts_of_the_same_tokens_share_a_group() -> None:
    prompts = [(1, 2), (3,), (1, 2), (1, 2, 4), (3,)]
    done = [
        Completion(Prompt(str(number), Conversation.user("hi"), ids), "", (0,), (0.0,), "stop", 0)
        for number, ids in enumerate(prompts)
    ]
    assert groups_of(done).tolist() == [0, 1, 0, 2, 1]


def test_metrics_of_the_answers_count_the_versions_between() -> None:
    first, *others = make_step(1)
    tokens = len(first.completion.token_ids)
    spans = (Span(0, 1), Span(1, tokens - 1))
    late = replace(first, completion=replace(first.completion, spans=spans))
    lengths = [len(answer.completion.token_ids) for answer in (first, *others)]
    assert answer_metrics([late, *others], 1)["staleness"] == pytest.approx(1 / sum(lengths))
    assert answer_metrics([late, *others], 1)["response_length"] == sum(lengths) / 13


SCORED = make_step(0)
FIRST, *OTHERS = SCORED
STALE = replace(SCORED[1], completion=replace(SCORED[1].completion, policy_version=3))
LONG = replace(FIRST.completion, token_ids=(1,) * 40, logprobs=(0.0,) * 40)
SPANS = (Span(-2, 1), Span(0, len(FIRST.completion.token_ids) - 1))
OLD = replace(FIRST.completion, spans=SPANS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.step(SCORED), "answer '0-0' was never prepared in this step"),
        (lambda found: found.step([STALE, *OTHERS]), "answer '0-1' must come from policy version 0, got 3"),
        (lambda found: found.split([STALE.completion]), "answer '0-1' must come from policy version 0, got 3"),
        (lambda found: found.split([OLD]), "answer '0-0' must come from policy version 0, got -2 to 0"),
        (lambda found: found.step([*OTHERS, OTHERS[0]]), "ids must be unique within a step, got '0-1' twice"),
        (lambda found: found.split([OTHERS[0].completion]), "ids must be unique within a step, got '0-1' twice"),
        (lambda found: found.split([LONG]), "answer '0-0' with its prompt must have at most 32 tokens, got 45"),
        (
            lambda found: found.split([replace(FIRST.completion, token_ids=())]),
            "answer '0-0' and its prompt must have at least one",
        ),
        (
            lambda found: found.split([replace(FIRST.completion, logprobs=())]),
            "answer '0-0' must have one logprob per token, got 0",
        ),
        (lambda found: found.step([replace(OTHERS[0], reward=float("inf")), *OTHERS[1:]]), "reward must be finite, got inf"),
        (lambda found: found.step(OTHERS[:1]), "update needs an answer per minibatch, got 1 answers for 2"),
    ],
)
def test_answers_that_must_not_be_trained_on_are_refused_by_name(call: Callable[[Sharder], object], message: str) -> None:
    found = sharder()
    found.split(completions(OTHERS))
    with pytest.raises(ValueError, match=message):
        call(found)


def test_answers_may_lag_as_many_versions_as_allowed() -> None:
    found = sharder(staleness=1)
    found.restart(1)
    found.split(completions(SCORED))
    with pytest.raises(ValueError, match="answer '2-0' must come from policy version 0 to 1, got 2"):
        found.split(completions(make_step(2)))


def test_an_answer_without_another_to_its_prompt_is_refused_where_they_are_compared() -> None:
    with pytest.raises(ValueError, match="grpo needs at least 2 answers to each prompt, got 1 to that of '0-0'"):
        whole_step(SCORED, 2, algorithm="grpo")
