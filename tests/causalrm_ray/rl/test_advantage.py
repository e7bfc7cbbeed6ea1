from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrm_ray.rl.advantage import centred, gae, grpo, moments, reward_to_go, rloo, token_rewards, whiten

# Row 0 acts at 1..3, row 1 at 0..1, row 2 at 2 only.
MASK = torch.tensor([[0.0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]])


def naive_gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, written as the double sum."""
    after = np.append(values[1:], 0.0)
    delta = rewards + gamma * after - values
    return np.array([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))])


def random_rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, generator=generator, dtype=torch.float64), torch.randn(
        3, 5, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.7, 1.0)])
def test_gae_equals_the_double_sum_over_action_tokens(gamma: float, lam: float) -> None:
    rewards, values = random_rows(0)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row in range(3):
        kept = MASK[row] != 0
        expected = naive_gae(rewards[row][kept].numpy(), values[row][kept].numpy(), gamma, lam)
        np.testing.assert_allclose(advantages[row][kept].numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(returns[row][kept].numpy(), expected + values[row][kept].numpy(), rtol=1e-12)
    assert bool((advantages[MASK == 0] == 0).all())
    assert bool((returns[MASK == 0] == 0).all())


def test_gae_with_lambda_one_is_monte_carlo_return() -> None:
    rewards, values = random_rows(1)
    _, returns = gae(rewards, values, MASK, 0.9, 1.0)
    row = rewards[0]
    assert float(returns[0, 1]) == pytest.approx(float(row[1] + 0.9 * row[2] + 0.81 * row[3]), rel=1e-12)
    assert float(returns[0, 3]) == pytest.approx(float(row[3]), rel=1e-12)


def test_gae_by_hand() -> None:
    rewards, values, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist() == [[0.25 - 0.5 + 0.5 * 0.75, 0.75]]
    assert returns.tolist() == [[0.625, 1.0]]


def test_gae_skips_gaps_in_the_mask() -> None:
    rewards, values = random_rows(2)
    gap = torch.tensor([[1.0, 0, 1, 1, 0]])
    joined = torch.ones(1, 3)
    kept = gap[0] != 0
    expected, _ = gae(rewards[:1, kept], values[:1, kept], joined, 0.9, 0.8)
    found, _ = gae(rewards[:1], values[:1], gap, 0.9, 0.8)
    assert torch.equal(found[0, kept], expected[0])


@pytest.mark.parametrize(("gamma", "lam", "name"), [(1.1, 0.5, "gamma"), (0.5, -0.1, "lam")])
def test_gae_names_the_argument_out_of_range(gamma: float, lam: float, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]"):
        gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), gamma, lam)


def test_reward_lands_on_last_action_token() -> None:
    rewards = token_rewards(torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3), MASK, torch.zeros(3, 5), 5.0)
    assert rewards.tolist() == [[0, 0, 0, 1, 0], [0, 2, 0, 0, 0], [0, 0, -3, 0, 0]]


def test_truncated_answers_pay_and_each_token_pays_its_penalty() -> None:
    penalty = torch.full((3, 5), 0.25)
    rewards = token_rewards(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.0, 1.0, 0.0]), MASK, penalty, 0.5)
    assert rewards.tolist() == [[0, -0.25, -0.25, 0.75, 0], [-0.25, 1.25, 0, 0, 0], [0, 0, -3.25, 0, 0]]


def test_token_rewards_refuse_a_row_without_action() -> None:
    with pytest.raises(ValueError, match="every row of mask must hold an action token, got none in row 1"):
        token_rewards(torch.zeros(2), torch.zeros(2), torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1), 0.0)


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    values, _ = random_rows(3)
    kept = whiten(values, MASK, moments(values, MASK))[MASK != 0]
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(kept.square().mean()) == pytest.approx(1.0, rel=1e-7)


def test_whitening_by_hand() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    total = moments(values, mask)
    assert total.tolist() == [4.0, 10.0, 2.0]
    assert whiten(values, mask, total).tolist() == [[pytest.approx(-1.0), pytest.approx(1.0), 0.0]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 2))
def test_whitening_is_invariant_to_the_split(seed: int, cut: int) -> None:
    values, _ = random_rows(seed)
    whole = whiten(values, MASK, moments(values, MASK))
    total = moments(values[:cut], MASK[:cut]) + moments(values[cut:], MASK[cut:])
    parts = torch.cat([whiten(values[:cut], MASK[:cut], total), whiten(values[cut:], MASK[cut:], total)])
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_equal_values_whiten_to_zero() -> None:
    values, mask = torch.full((2, 3), 0.7), torch.ones(2, 3)
    assert float(whiten(values, mask, moments(values, mask)).abs().max()) <= 1e-3


def test_whitening_refuses_an_empty_count() -> None:
    with pytest.raises(ValueError, match=r"total must count at least one entry, got 0\.0"):
        whiten(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(3, dtype=torch.float64))


def test_group_advantages_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 7.0, 3.0]), torch.tensor([0, 1, 0, 1, 1])
    pair, three = 1 / (1 + 1e-4), 8 / 3
    expected = [-pair, 0.0, pair, 2 / (three**0.5 + 1e-4), -2 / (three**0.5 + 1e-4)]
    np.testing.assert_allclose(grpo(rewards, groups).numpy(), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(rloo(rewards, groups).numpy(), [-2.0, 0.0, 2.0, 3.0, -3.0], rtol=1e-12, atol=1e-15)
    assert centred(rewards, groups).tolist() == [-1.0, 0.0, 1.0, 2.0, -2.0]


@pytest.mark.parametrize("estimate", [centred, grpo, rloo])
def test_group_advantages_sum_to_zero_within_the_group_and_ignore_its_level(estimate) -> None:
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 1])
    found = estimate(rewards, groups)
    for group in range(3):
        assert float(found[groups == group].sum()) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(estimate(rewards + 10.0 * groups, groups), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimate", [centred, grpo, rloo])
def test_a_group_of_equal_rewards_gives_no_direction(estimate) -> None:
    assert float(estimate(torch.full((3,), 0.1), torch.zeros(3).long()).abs().max()) <= 1e-10


@pytest.mark.parametrize("estimate", [centred, grpo, rloo])
def test_group_advantages_refuse_a_group_of_one_and_what_is_not_finite(estimate) -> None:
    with pytest.raises(ValueError, match="every group must hold at least 2 answers, got 1 in group 1"):
        estimate(torch.zeros(3), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="rewards must be finite, got nan at position 0"):
        estimate(torch.tensor([float("nan"), 0.0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"rows must match, got \{'rewards': 2, 'groups': 3\}"):
        estimate(torch.zeros(2), torch.zeros(3).long())


def test_rloo_is_unbiased_by_enumeration() -> None:
    prob, payoff = [0.5, 0.3, 0.2], [1.0, -2.0, 4.0]
    score = torch.eye(3, dtype=torch.float64) - torch.tensor(prob, dtype=torch.float64)  # gradient of log prob by the logits
    expected = sum(p * r * score[k] for k, (p, r) in enumerate(zip(prob, payoff, strict=True)))
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(3):
        for second in range(3):
            advantage = rloo(torch.tensor([payoff[first], payoff[second]]), torch.tensor([0, 0]))
            total += prob[first] * prob[second] * (advantage[0] * score[first] + advantage[1] * score[second]) / 2
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_reward_to_go_by_hand() -> None:
    found = reward_to_go(torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0]]), torch.tensor([[0.0, 1, 0, 1, 1]]), 0.5)
    assert found.tolist() == [[0.0, 1 + 0.5 * 2 + 0.25 * 4, 0.0, 2 + 0.5 * 4, 4.0]]
