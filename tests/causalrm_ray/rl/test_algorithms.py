from __future__ import annotations

import numpy as np
import pytest
import torch

from causalrm_ray import registry
from causalrm_ray.rl.algorithms import ALGORITHMS, Advantages, Rows
from causalrm_ray.rl.experience import Experience, Objective

LENGTHS = [3, 1, 4, 2, 2]
GROUPS = [0, 1, 0, 1, 0]
MASK = torch.tensor([[float(t < length) for t in range(4)] for length in LENGTHS])


def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) * MASK
    trained = MASK * torch.tensor([1.0, 1, 1, 0, 1])[:, None]
    return Rows(rewards, MASK.double(), trained.double(), values, torch.arange(5), torch.tensor(GROUPS))


def part(whole: Rows, places: list[int]) -> Rows:
    own = (field[places] for field in whole[:5])
    return Rows(*own, whole.groups_N)


def ranks(name: str, whole: Rows, shares: list[list[int]]) -> list[Advantages]:
    """What each of several ranks gets: each is called twice, first to collect what it adds to the sum over all."""
    offered: list[torch.Tensor] = []
    run = ALGORITHMS[name].advantages

    def offer(value: torch.Tensor) -> torch.Tensor:
        offered.append(value.clone())
        return value + 1 + torch.arange(value.numel())  # anything that can be whitened by

    for share in shares:
        run(part(whole, share), 0.8, offer)
    total = torch.stack(offered).sum(dim=0)
    return [run(part(whole, share), 0.8, lambda value: total.clone()) for share in shares]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_do_not_depend_on_the_split_over_ranks(name: str) -> None:
    whole = ALGORITHMS[name].advantages(rows(), 0.8, lambda value: value)
    for shares in ([[0, 2, 4], [1, 3]], [[3, 0], [1], [4, 2]], [[4, 3, 2, 1, 0], []]):
        found = ranks(name, rows(), shares)
        for share, advantages in zip(shares, found, strict=True):
            for own, expected in zip(advantages, whole, strict=True):
                torch.testing.assert_close(own, expected[share], rtol=1e-12, atol=1e-12)


def test_group_algorithms_give_each_token_its_answer_s_advantage() -> None:
    given = rows()
    returns = given.rewards_BR.sum(dim=1).tolist()
    found = {name: ALGORITHMS[name].advantages(given, 1.0, lambda value: value).advantages_BR for name in ("grpo", "rloo")}
    for place, reward in enumerate(returns):
        group = [returns[other] for other in range(5) if GROUPS[other] == GROUPS[place]]
        others = [returns[other] for other in range(5) if GROUPS[other] == GROUPS[place] and other != place]
        expected = {"grpo": (reward - np.mean(group)) / (np.std(group) + 1e-4), "rloo": reward - np.mean(others)}
        for name, advantage in expected.items():
            row = [advantage] * LENGTHS[place] + [0.0] * (4 - LENGTHS[place])
            np.testing.assert_allclose(found[name][place].numpy(), row, rtol=1e-10, atol=1e-14)


def test_reinforce_pp_is_the_whitened_reward_to_go_of_trained_tokens() -> None:
    given = rows()
    found = ALGORITHMS["reinforce_pp"].advantages(given, 0.0, lambda value: value).advantages_BR
    to_go = [
        [sum(float(given.rewards_BR[row, later]) for later in range(t, length)) for t in range(length)]
        for row, length in enumerate(LENGTHS)
    ]
    trained = np.concatenate([to_go[row] for row in (0, 1, 2, 4)])
    for row in (0, 1, 2, 4):
        expected = (np.array(to_go[row]) - trained.mean()) / np.sqrt(trained.var() + 1e-8)
        np.testing.assert_allclose(found[row, : LENGTHS[row]].numpy(), expected, rtol=1e-10)
    assert bool((found[3] == 0).all())


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp"])
def test_a_step_with_nothing_to_train_on_has_no_advantages(name: str) -> None:
    given = rows()._replace(trained_BR=torch.zeros(5, 4, dtype=torch.float64))
    assert bool((ALGORITHMS[name].advantages(given, 1.0, lambda value: value).advantages_BR == 0).all())


def test_every_algorithm_can_be_named_and_only_ppo_has_a_critic() -> None:
    assert set(registry.ALGORITHMS.names()) == set(ALGORITHMS)
    assert [name for name, algorithm in ALGORITHMS.items() if not algorithm.grouped] == ["ppo", "reinforce_pp"]
    assert [name for name, algorithm in ALGORITHMS.items() if algorithm.critic] == ["ppo"]


# What each does with one answer of 2 tokens, and one of 1, at a size of 2 answers or 3 tokens; at most 4 tokens to an answer.
# All by hand: ratios 1.5 and 0.5 of a good answer, 4 of a bad one; advantages 1 and -1; logprobs -1, -2 and -3.
BY_HAND = {
    "ppo": (-1.2 - 0.5 + 3) / 3,
    "grpo": ((-1.2 - 0.5) / 2 + 3) / 2,
    "rloo": (-1.2 - 0.5 + 3) / 3,
    "reinforce_pp": (-1.2 - 0.5 + 3) / 3,
    "gspo": (-(0.75**0.5) + 4) / 2,  # the ratio of the first is the root of 1.5 x 0.5
    "dapo": (-1.28 - 0.5 + 3) / 3,
    "dr_grpo": ((-1.2 - 0.5) / 4 + 3 / 4) / 2,
    "cispo": (1.5 * 1 + 0.5 * 2 - 4 * 3) / 3,
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_of_each_algorithm_by_hand(name: str) -> None:
    algorithm, mask = ALGORITHMS[name], torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    objective = Objective(algorithm, algorithm.clip, "k1", 1.0, 0.0, max_new_tokens=4)
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], dtype=torch.float64)
    old = logprobs - torch.tensor([[1.5, 0.5], [4.0, 1.0]]).double().log()
    zero, advantages = torch.zeros_like(mask), torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    rows = Experience(mask, objective.shares(mask), old, zero, torch.ones_like(mask), advantages, zero, zero)
    loss, _ = objective.loss(logprobs, zero, zero, rows, objective.minibatch_size(answers=2, tokens=3), 0.0)
    assert float(loss) == pytest.approx(BY_HAND[name], rel=1e-12)
