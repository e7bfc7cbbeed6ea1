from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrm_ray.rl.policy_loss import (
    Clip,
    adapt_kl_coefficient,
    cispo,
    entropy,
    importance_weight,
    kl_k1,
    kl_k2,
    kl_k3,
    log_distribution,
    masked_mean,
    ppo_clip,
    sequence_ratio,
    token_logprobs,
    token_ratio,
    value_loss,
)

CLIP = Clip(0.2, 0.2)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_and_entropy_equal_a_naive_loop(temperature: float) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    distribution = log_distribution(logits, temperature)
    logprobs, entropies = token_logprobs(distribution, tokens), entropy(distribution)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(float(logit) / temperature) for logit in logits[b, t]]
            probs = [weight / sum(weights) for weight in weights]
            assert float(logprobs[b, t]) == pytest.approx(math.log(probs[tokens[b, t]]), rel=1e-5)
            assert float(entropies[b, t]) == pytest.approx(-sum(prob * math.log(prob) for prob in probs), rel=1e-5)


def test_entropy_of_a_certain_token_is_zero_and_of_equal_ones_is_log_vocabulary() -> None:
    logits = torch.tensor([[[0.0, -math.inf, -math.inf, -math.inf], [1.0, 1.0, 1.0, 1.0]]])
    assert entropy(log_distribution(logits, 1.0)).tolist() == [[0.0, pytest.approx(math.log(4))]]


NONE = torch.zeros(())  # a loss by the ratio reads no log-probabilities


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        log_distribution(torch.zeros(1, 1, 2), 0.0)


def test_ppo_loss_by_hand() -> None:
    ratio = tensor(2.0, 2.0, 2 / 3, 2 / 3)
    losses = ppo_clip(NONE, ratio, tensor(1.0, -1.0, 1.0, -1.0), CLIP)
    np.testing.assert_allclose(losses[0].numpy(), [-1.2, 2.0, -2 / 3, 0.8], rtol=1e-12)


def test_ratios_of_tokens_and_of_whole_answers_by_hand() -> None:
    new, old, mask = tensor(-1.0, -2.0, -9.0), tensor(-2.0, -1.5, 0.0), tensor(1.0, 1.0, 0.0)
    np.testing.assert_allclose(token_ratio(new, old, mask)[0, :2].numpy(), [math.e, math.exp(-0.5)], rtol=1e-12)
    np.testing.assert_allclose(sequence_ratio(new, old, mask)[0].numpy(), [math.exp(0.25)] * 3, rtol=1e-12)
    assert sequence_ratio(new, old, 0 * mask).tolist() == [[1.0, 1.0, 1.0]]  # a padding row


def test_ppo_gradient_is_zero_where_clipped_and_is_the_policy_gradient_at_ratio_one() -> None:
    ratio = tensor(2.0, 2.0, 2 / 3, 2 / 3, 1.0).requires_grad_()
    ppo_clip(NONE, ratio, tensor(1.0, -1.0, 1.0, -1.0, 3.0), CLIP).sum().backward()
    np.testing.assert_allclose(ratio.grad[0].numpy(), [0.0, 1.0, -1.0, 0.0, -3.0], rtol=1e-12)


def test_a_higher_clip_lets_good_tokens_grow_further_and_changes_nothing_below_one() -> None:
    losses = ppo_clip(NONE, tensor(1.25, 2.0, 0.5, 0.5), tensor(1.0, 1.0, 1.0, -1.0), Clip(0.2, 0.28))
    np.testing.assert_allclose(losses[0].numpy(), [-1.25, -1.28, -0.5, 0.8], rtol=1e-12)


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    ratio, advantages = tensor(8.0, 2.0, 0.5, 8.0).requires_grad_(), tensor(-1.0, -1.0, -2.0, 1.0)
    losses = ppo_clip(NONE, ratio, advantages, CLIP, 3.0)
    np.testing.assert_allclose(losses.detach()[0].numpy(), [3.0, 2.0, 1.6, -1.2], rtol=1e-12)
    losses.sum().backward()
    np.testing.assert_allclose(ratio.grad[0].numpy(), [0.0, 1.0, 0.0, 0.0], rtol=1e-12)
    with pytest.raises(ValueError, match=r"dual_clip must be above 1, got 1\.0"):
        ppo_clip(NONE, ratio, advantages, CLIP, 1.0)


def test_cispo_weighs_the_policy_gradient_by_a_clipped_ratio_and_drops_no_token() -> None:
    logprobs, advantages = tensor(-1.0, -2.0, -3.0, -1.0).requires_grad_(), tensor(1.0, -2.0, 0.5, -1.0)
    losses = cispo(logprobs, tensor(0.1, 1.5, 9.0, 9.0), advantages, Clip(1.0, 4.0))
    np.testing.assert_allclose(losses.detach()[0].numpy(), [0.1, -6.0, 7.5, -5.0], rtol=1e-12)
    losses.sum().backward()
    np.testing.assert_allclose(logprobs.grad[0].numpy(), [-0.1, 3.0, -2.5, 5.0], rtol=1e-12)


def test_value_loss_by_hand() -> None:
    losses = value_loss(tensor(1.0, 1.0, 0.1), tensor(0.0, 0.0, 0.0), tensor(3.0, 1.0, 1.0), 0.2)
    np.testing.assert_allclose(losses[0].numpy(), [0.5 * 2.8**2, 0.5 * 0.8**2, 0.5 * 0.9**2], rtol=1e-12)


def test_value_gradient_is_zero_where_the_clipped_error_is_the_larger() -> None:
    values = tensor(1.0, 0.1).requires_grad_()
    value_loss(values, tensor(0.0, 0.0), tensor(1.2, 1.0), 0.2).sum().backward()
    np.testing.assert_allclose(values.grad[0].numpy(), [0.0, -0.9], rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(difference=st.floats(-5, 5))
def test_kl_estimators_equal_their_formulas_and_k2_k3_are_never_negative(difference: float) -> None:
    new, reference = tensor(difference), tensor(0.0)
    assert float(kl_k1(new, reference)) == difference
    assert float(kl_k2(new, reference)) == pytest.approx(difference**2 / 2)
    assert float(kl_k3(new, reference)) == pytest.approx(math.exp(-difference) - 1 + difference, abs=1e-12)
    assert float(kl_k3(new, reference)) >= -max(abs(difference) * 2**-51, 1e-300)  # expm1 may be wrong in its last bit
    assert float(kl_k2(new, reference)) >= 0


def test_k1_and_k3_are_unbiased_under_the_policy() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    truth = float((policy * (policy / reference).log()).sum())
    for estimator in (kl_k1, kl_k3):
        assert float((policy * estimator(policy.log(), reference.log())).sum()) == pytest.approx(truth, rel=1e-5)


def test_k2_has_the_gradient_of_the_kl_under_the_policy() -> None:
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    logits = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((logprobs.exp().detach() * kl_k2(logprobs, reference)).sum(), logits)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(2.0, 0.1), (100.0, 0.1 * (1 + 0.2 * 50 / 5000)), (0.0, 0.1 * (1 - 0.2 * 50 / 5000)), (2.2, 0.1 * (1 + 0.1 * 50 / 5000))],
)
def test_kl_coefficient_moves_towards_the_target_by_a_bounded_step(kl: float, expected: float) -> None:
    assert adapt_kl_coefficient(0.1, kl, 2.0, 50, 5000) == pytest.approx(expected, rel=1e-12)


def test_kl_target_must_be_positive() -> None:
    with pytest.raises(ValueError, match="target must be above 0, got 0"):
        adapt_kl_coefficient(0.1, 1.0, 0.0, 50, 5000)


def test_importance_weight_is_the_ratio_up_to_its_cap() -> None:
    learner, engine = tensor(math.log(0.5), math.log(0.5), math.log(0.1)), tensor(math.log(0.5), math.log(0.1), math.log(0.4))
    np.testing.assert_allclose(importance_weight(learner, engine, 2.0)[0].numpy(), [1.0, 2.0, 0.25], rtol=1e-12)
    np.testing.assert_allclose(importance_weight(learner, engine, math.inf)[0].numpy(), [1.0, 5.0, 0.25], rtol=1e-12)
    with pytest.raises(ValueError, match="cap must be above 0, got 0"):
        importance_weight(learner, engine, 0.0)


def test_importance_weights_correct_the_expectation_under_the_engine() -> None:
    learner, engine = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.3, 0.3])
    payoff = torch.tensor([1.0, -2.0, 5.0])
    weights = importance_weight(learner.log(), engine.log(), math.inf)
    assert float((engine * weights * payoff).sum()) == pytest.approx(float((learner * payoff).sum()), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 5))
def test_loss_is_invariant_to_data_parallel_split(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mask = (torch.rand(6, 4, generator=generator) < 0.6).double()
    mask[0, 0] = 1.0
    count = float(mask.sum())
    parts = masked_mean(loss[:cut], mask[:cut], count) + masked_mean(loss[cut:], mask[cut:], count)
    assert float(parts) == pytest.approx(float(loss[mask != 0].mean()), rel=1e-10, abs=1e-12)


def test_masked_mean_refuses_an_empty_count() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        masked_mean(torch.zeros(1, 1), torch.zeros(1, 1), 0)
