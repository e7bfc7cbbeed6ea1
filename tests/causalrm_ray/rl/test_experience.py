from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from causalrm_ray.rl.algorithms import ALGORITHMS
from causalrm_ray.rl.experience import Answers, Experience, Objective, make_experience
from causalrm_ray.rl.policy_loss import Clip, kl_k1

LENGTHS = [3, 1, 4]
MASK = torch.tensor([[float(t < length) for t in range(4)] for length in LENGTHS], dtype=torch.float64)


def answers() -> Answers:
    generator = torch.Generator().manual_seed(1)
    fields = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64) * MASK
    return Answers(MASK, *fields, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), torch.arange(3))


def objective(name: str, kl: str | None = None, truncation: float | str = 1.0) -> Objective:
    algorithm = ALGORITHMS[name]
    return Objective(algorithm, algorithm.clip, kl or algorithm.kl, 0.95, truncation, max_new_tokens=4)


def make(name: str, kl: str | None = None, truncation: float | str = 1.0) -> Experience:
    rewards, groups = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3).long()
    return make_experience(answers(), rewards, groups, objective(name, kl, truncation), 0.1, lambda value: value)


def test_a_truncated_answer_pays_or_is_compared_with_but_not_whitened_over() -> None:
    paying = make("rloo", "k3", truncation=2.0).advantages_BR
    np.testing.assert_allclose(paying[:, 0].numpy(), [1.0 - (-2.0 - 1.5) / 2, -2.0 - (1.0 - 1.5) / 2, -1.5 + 0.5], rtol=1e-6)
    masked = make("rloo", "k3", truncation="mask").advantages_BR
    np.testing.assert_allclose(masked[:2, 0].numpy(), [1.0 - (-2.0 + 0.5) / 2, -2.0 - (1.0 + 0.5) / 2], rtol=1e-6)
    whitened = make("reinforce_pp", truncation="mask").advantages_BR
    assert bool((whitened[2] == 0).all())
    assert float(whitened[:2][MASK[:2] != 0].mean()) == pytest.approx(0.0, abs=1e-12)


def test_k1_is_taken_off_the_reward_and_the_others_are_not() -> None:
    given = answers()
    difference = (given.logprobs_BR - given.reference_logprobs_BR).sum(dim=1)
    in_reward, in_loss = (make("rloo", name).advantages_BR[:, 0] for name in ("k1", "k2"))
    expected = -0.1 * 1.5 * (difference - difference.mean())
    np.testing.assert_allclose((in_reward - in_loss).numpy(), expected.numpy(), rtol=1e-6)


def test_old_logprobs_filled_in_the_step_give_the_same_rows_as_those_computed_before_it() -> None:
    given = answers()
    others = (torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3).long(), objective("grpo"), 0.1, lambda value: value)
    before = make_experience(given, *others)
    unseen = make_experience(given._replace(logprobs_BR=given.rollout_logprobs_BR), *others)
    assert torch.equal(unseen.weights_BR, torch.ones(3, 4))
    seen = unseen.with_old_logprobs(given.logprobs_BR + 9 * (1 - MASK))  # the model gives pads a probability, too
    assert all(torch.equal(found, expected) for found, expected in zip(seen, before, strict=True))


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"name": "grpo"}, 1, True),
        ({"name": "cispo"}, 1, True),
        ({"name": "rloo", "kl": "k2"}, 1, True),
        ({"name": "grpo"}, 2, False),
        ({"name": "grpo", "truncation": "mask"}, 1, False),  # answers that are left out are never seen in the step
        ({"name": "grpo", "kl": "k1"}, 1, False),  # in the reward: needed before
        ({"name": "ppo", "kl": "k2"}, 1, False),  # the old values are needed before
    ],
)
def test_old_logprobs_are_filled_in_the_step_only_where_nothing_needs_them_before(
    options: dict, steps: int, expected: bool
) -> None:
    assert objective(**options).fills_old_logprobs_in_step(steps) is expected


def naive_token_loss(name: str, ratio: float, logprob: float, advantage: float, clip: Clip) -> float:
    inside = min(max(ratio, 1 - clip.low), 1 + clip.high)
    if name == "cispo":
        return -inside * advantage * logprob
    loss = -min(ratio * advantage, inside * advantage)
    return loss if name == "gspo" or advantage >= 0 else min(loss, -3 * advantage)


def naive_loss(name: str, logprobs: list[list[float]], values: list[list[float]], old: Experience, clip: Clip) -> float:
    """The whole minibatch's loss in loops over Python's floats; KL by k3 with coefficient 0.3, values clipped."""
    rows = []
    for row, length in enumerate(LENGTHS):
        differences = [logprobs[row][t] - float(old.logprobs_BR[row, t]) for t in range(length)]
        tokens = []
        for t, difference in enumerate(differences):
            ratio = math.exp(sum(differences) / length if name == "gspo" else difference)
            loss = naive_token_loss(name, ratio, logprobs[row][t], float(old.advantages_BR[row, t]), clip)
            loss *= float(old.weights_BR[row, t])
            if name == "ppo":
                before, target = float(old.values_BR[row, t]), float(old.returns_BR[row, t])
                near = before + min(max(values[row][t] - before, -clip.low), clip.low)
                loss += max((values[row][t] - target) ** 2, (near - target) ** 2) / 2
            d = logprobs[row][t] - float(old.reference_logprobs_BR[row, t])
            tokens.append(loss + 0.3 * (math.exp(-d) - 1 + d))
        rows.append(tokens)
    if name in ("grpo", "gspo"):
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if name == "dr_grpo":
        return sum(sum(row) for row in rows) / 4 / len(rows)
    return sum(sum(row) for row in rows) / sum(LENGTHS)


def changed(old: Experience, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, values) far from the old ones, so that every clip binds somewhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = 2.0 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return old.logprobs_BR + noise[0], old.values_BR + noise[1]


def rows_of(old: Experience, rows: list[int]) -> Experience:
    return Experience(*(field[rows] for field in old))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_a_naive_loop(name: str, seed: int) -> None:
    old, made = make(name), objective(name, "k3")
    logprobs, values = changed(old, seed)
    size = made.minibatch_size(len(LENGTHS), sum(LENGTHS))
    loss, _ = made.loss(logprobs, MASK, values, old, size, 0.3)
    assert float(loss) == pytest.approx(naive_loss(name, logprobs.tolist(), values.tolist(), old, made.clip), rel=1e-10)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "cispo"])  # whose gradient is not its loss's
def test_gradient_equals_the_differences_of_a_naive_loop(name: str) -> None:
    old, made = make(name), objective(name, "k3")
    logprobs, values = (value.requires_grad_() for value in changed(old, 0))
    size = made.minibatch_size(len(LENGTHS), sum(LENGTHS))
    made.loss(logprobs, MASK, values, old, size, 0.3)[0].backward()
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            ends = []
            for change in (1e-6, -1e-6):
                moved = logprobs.tolist()
                moved[row][t] += change
                ends.append(naive_loss(name, moved, values.tolist(), old, made.clip))
            assert float(logprobs.grad[row, t]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("split", [[[0, 1], [2]], [[2, 0], [1]], [[0], [1], [2]]])
def test_loss_and_gradient_do_not_depend_on_ranks_and_micro_batches(name: str, split: list[list[int]]) -> None:
    old, made = make(name), objective(name, "k3")
    size = made.minibatch_size(len(LENGTHS), sum(LENGTHS))
    found = []
    for parts in ([[0, 1, 2]], split):
        logprobs, values = (value.requires_grad_() for value in changed(old, 1))
        loss = sum(made.loss(logprobs[rows], MASK[rows], values[rows], rows_of(old, rows), size, 0.3)[0] for rows in parts)
        loss.backward()
        found.append((loss.detach(), logprobs.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_the_bounds_of_the_ratio_and_of_the_value_s_step_bind_where_they_should() -> None:
    old, made = make("ppo"), objective("ppo")
    mask, one = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    old = Experience(mask, mask, 0 * one, 0 * one, one, -one, 0 * one, 2 * one)  # a bad token; value 0, return 2
    loss, figures = made.loss(math.log(10) * one, 0 * one, one, old, 1, 0.0)
    assert float(loss) == pytest.approx(3.0 + (2 - 0.2) ** 2 / 2, rel=1e-12)  # not 10: DUAL_CLIP; and half the clipped error
    assert figures[:2].tolist() == pytest.approx([3.0, 1.62], rel=1e-12)


def test_figures_are_sums_over_tokens_and_the_largest_ratio() -> None:
    old = make("rloo")
    _, figures = objective("rloo").loss(old.logprobs_BR + 0.05, torch.ones(3, 4), torch.zeros(3, 4), old, 8, 0.3)
    _, value, entropy, ratio, clipped, kl, tokens, largest = figures.tolist()
    assert (value, entropy, clipped, tokens) == (0.0, 8.0, 0.0, 8.0)
    assert ratio == pytest.approx(8 * math.exp(0.05), rel=1e-9)
    assert kl == pytest.approx(8 * (math.exp(0.05) - 1 - 0.05), rel=1e-9)
    assert largest == pytest.approx(math.exp(0.05), rel=1e-9)
    _, figures = objective("dapo").loss(old.logprobs_BR + math.log(1.25), torch.ones(3, 4), torch.zeros(3, 4), old, 8, 0.3)
    assert float(figures[4]) == 0.0  # inside 1.28
    _, figures = objective("rloo").loss(old.logprobs_BR + math.log(1.25), torch.ones(3, 4), torch.zeros(3, 4), old, 8, 0.3)
    assert float(figures[4]) == 8.0


def test_k1_as_a_loss_would_steer_nowhere_in_expectation() -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logprobs, reference = logits.log_softmax(-1), torch.full((5,), math.log(0.2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * kl_k1(logprobs, reference)).sum(), logits)
    assert float(gradient.abs().max()) <= 1e-15
