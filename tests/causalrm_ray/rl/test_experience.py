from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from causalrm_ray.config.train import KLConfig, LearnerConfig
from causalrm_ray.rl.experience import (
    Answers,
    Experience,
    Objective,
    fills_old_logprobs_in_step,
    groups_of,
    kl_estimator,
    make_experience,
)
from causalrm_ray.rl.policy import kl_k1
from causalrm_ray.types import Completion, Prompt

LENGTHS = [3, 1, 4]
MASK = torch.tensor([[float(t < length) for t in range(4)] for length in LENGTHS], dtype=torch.float64)


def answers() -> Answers:
    generator = torch.Generator().manual_seed(1)
    fields = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64) * MASK
    return Answers(MASK, *fields, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), torch.arange(3))


def make(**options: object) -> Experience:
    config = LearnerConfig(**options)
    return make_experience(answers(), torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3).long(), config, 0.1, lambda value: value)


def test_a_truncated_answer_pays_or_is_compared_with_but_not_whitened_over() -> None:
    paying = make(algorithm="rloo", truncation=2.0, kl={"estimator": "k3"}).advantages_BR
    np.testing.assert_allclose(paying[:, 0].numpy(), [1.0 - (-2.0 - 1.5) / 2, -2.0 - (1.0 - 1.5) / 2, -1.5 + 0.5], rtol=1e-6)
    masked = make(algorithm="rloo", truncation="mask", kl={"estimator": "k3"}).advantages_BR
    np.testing.assert_allclose(masked[:2, 0].numpy(), [1.0 - (-2.0 + 0.5) / 2, -2.0 - (1.0 + 0.5) / 2], rtol=1e-6)
    whitened = make(algorithm="reinforce_pp", truncation="mask").advantages_BR
    assert bool((whitened[2] == 0).all())
    assert float(whitened[:2][MASK[:2] != 0].mean()) == pytest.approx(0.0, abs=1e-12)


def test_k1_is_taken_off_the_reward_and_the_others_are_not() -> None:
    given = answers()
    difference = (given.logprobs_BR - given.reference_logprobs_BR).sum(dim=1)
    in_reward, in_loss = (make(algorithm="rloo", kl={"estimator": name}).advantages_BR[:, 0] for name in ("k1", "k2"))
    expected = -0.1 * 1.5 * (difference - difference.mean())
    np.testing.assert_allclose((in_reward - in_loss).numpy(), expected.numpy(), rtol=1e-6)


def test_the_estimator_is_the_algorithm_s_own_unless_one_is_named() -> None:
    own = {name: kl_estimator(LearnerConfig(algorithm=name)) for name in ("ppo", "grpo", "rloo", "reinforce_pp")}
    assert own == {"ppo": "k1", "grpo": "k3", "rloo": "k1", "reinforce_pp": "k1"}
    assert kl_estimator(LearnerConfig(algorithm="grpo", kl=KLConfig(estimator="k2"))) == "k2"


def test_a_learner_that_looks_in_the_step_trains_on_what_one_trains_on_that_looked_before() -> None:
    given, config = answers(), LearnerConfig(algorithm="grpo")
    others = (torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3).long(), config, 0.1, lambda value: value)
    before = make_experience(given, *others)
    unseen = make_experience(given._replace(logprobs_BR=given.rollout_logprobs_BR), *others)
    assert torch.equal(unseen.weights_BR, torch.ones(3, 4))
    seen = unseen.now_seen(given.logprobs_BR + 9 * (1 - MASK))  # the model says something of pads, too
    assert all(torch.equal(found, expected) for found, expected in zip(seen, before, strict=True))


ONCE = {"epochs": 1, "minibatches": 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ONCE | {"algorithm": "grpo"}, True),
        (ONCE | {"algorithm": "rloo", "kl": {"estimator": "k2"}}, True),
        ({"algorithm": "grpo", "epochs": 2, "minibatches": 1}, False),
        ({"algorithm": "grpo", "epochs": 1, "minibatches": 2}, False),
        (ONCE | {"algorithm": "grpo", "truncation": "mask"}, False),  # answers that are left out are never seen in the step
        (ONCE | {"algorithm": "grpo", "kl": {"estimator": "k1"}}, False),  # in the reward: needed before
        (ONCE | {"algorithm": "ppo", "kl": {"estimator": "k2"}}, False),  # the old values are needed before
    ],
)
def test_the_old_policy_is_looked_at_once_only_where_nothing_needs_it_before(options: dict, expected: bool) -> None:
    assert fills_old_logprobs_in_step(LearnerConfig(**options)) is expected


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_loss_is_the_mean_over_tokens_or_for_grpo_over_answers_of_their_means(algorithm: str) -> None:
    old = make(algorithm=algorithm)
    new = old.logprobs_BR + 0.05
    count = sum(LENGTHS) if algorithm == "rloo" else 3
    objective = Objective(0.2, False, "k3", 0.3)
    loss, figures = objective.loss(new, torch.ones(3, 4), torch.zeros(3, 4), old, count)
    rows = []
    for row, length in enumerate(LENGTHS):
        tokens = []
        for t in range(length):
            d = float(new[row, t] - old.reference_logprobs_BR[row, t])
            weight = min(math.exp(float(old.logprobs_BR[row, t] - answers().rollout_logprobs_BR[row, t])), 2.0)
            tokens.append(-weight * math.exp(0.05) * float(old.advantages_BR[row, t]) + 0.3 * (math.exp(-d) - 1 + d))
        rows.append(tokens)
    expected = np.mean(np.concatenate(rows)) if algorithm == "rloo" else np.mean([np.mean(row) for row in rows])
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    _, value, entropy, ratio, clipped, kl, tokens, largest = figures.tolist()
    assert (value, entropy, clipped, tokens) == (0.0, 8.0, 0.0, 8.0)
    assert ratio == pytest.approx(8 * math.exp(0.05), rel=1e-9)
    assert kl == pytest.approx(8 * (math.exp(0.05) - 1 - 0.05), rel=1e-9)
    assert largest == pytest.approx(math.exp(0.05), rel=1e-9)


def test_k1_as_a_loss_would_steer_nowhere_in_expectation() -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logprobs, reference = logits.log_softmax(-1), torch.full((5,), math.log(0.2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * kl_k1(logprobs, reference)).sum(), logits)
    assert float(gradient.abs().max()) <= 1e-15


def test_answers_to_prompts_of_the_same_tokens_share_a_group() -> None:
    prompts = [(1, 2), (3,), (1, 2), (1, 2, 4), (3,)]
    done = [Completion(Prompt(str(number), "", ids), "", (0,), (0.0,), "stop", 0) for number, ids in enumerate(prompts)]
    assert groups_of(done).tolist() == [0, 1, 0, 2, 1]
