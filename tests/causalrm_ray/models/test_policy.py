from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from causalrm_ray.models.policy import ActorCritic, Reference

ROWS = [[3, 7, 1, 4, 9, 2], [5, 5, 8]]
TEMPERATURE = 0.7


def make_policy(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def padded(pad: int = 0) -> torch.Tensor:
    return torch.tensor([row + [pad] * (6 - len(row)) for row in ROWS])


def test_logprobs_and_entropy_equal_one_row_at_a_time_without_padding() -> None:
    module = ActorCritic(make_policy())
    outputs = module(padded(), 0, TEMPERATURE)
    for b, row in enumerate(ROWS):
        logits = module.policy(torch.tensor([row])).logits[0].double() / TEMPERATURE
        for t, token in enumerate(row[1:]):
            probs = [math.exp(float(logit)) for logit in logits[t]]
            assert float(outputs.logprobs_BT[b, t]) == pytest.approx(math.log(probs[token] / sum(probs)), rel=1e-4, abs=1e-5)
            expected = -sum(p / sum(probs) * math.log(p / sum(probs)) for p in probs)
            assert float(outputs.entropy_BT[b, t]) == pytest.approx(expected, rel=1e-4)


def test_pads_change_no_real_token() -> None:
    module = ActorCritic(make_policy())
    module.value_head.weight.data.fill_(0.1)
    first, second = module(padded(0), 0, 1.0), module(padded(11), 0, 1.0)
    for field in ("logprobs_BT", "values_BT", "entropy_BT"):
        assert torch.equal(getattr(first, field)[0], getattr(second, field)[0])
        assert torch.equal(getattr(first, field)[1, :2], getattr(second, field)[1, :2])


def test_start_leaves_out_leading_positions_only() -> None:
    module = ActorCritic(make_policy())
    for whole, late in zip(module(padded(), 0, 1.0), module(padded(), 2, 1.0), strict=True):
        assert late.shape == (2, 3)
        torch.testing.assert_close(late, whole[:, 2:])
    with pytest.raises(ValueError, match=r"start must be in \[0, 4\] for rows of 6 tokens, got 5"):
        module(padded(), 5, 1.0)


def test_values_start_at_zero_and_read_only_tokens_before_the_action() -> None:
    module = ActorCritic(make_policy())
    assert module(padded(), 0, 1.0).values_BT.abs().max() == 0
    module.value_head.weight.data.fill_(0.1)
    other = padded()
    other[0, 3] = 12  # token 3 is the action of entry 2
    first, second = module(padded(), 0, 1.0).values_BT, module(other, 0, 1.0).values_BT
    assert torch.equal(first[0, :3], second[0, :3])
    assert not torch.equal(first[0, 3:], second[0, 3:])


def test_critic_starts_as_the_policys_backbone_and_shares_nothing_with_it() -> None:
    module = ActorCritic(make_policy())
    policy = dict(module.policy.base_model.named_parameters())
    critic = dict(module.critic.named_parameters())
    assert policy.keys() == critic.keys()
    for name, value in policy.items():
        assert torch.equal(value, critic[name])
        assert value.data_ptr() != critic[name].data_ptr()


def test_each_objective_moves_only_its_own_parameters() -> None:
    module = ActorCritic(make_policy())
    module.value_head.weight.data.fill_(0.1)
    module(padded(), 0, 1.0).values_BT.sum().backward()
    assert all(parameter.grad is None for parameter in module.policy.parameters())
    module.zero_grad(set_to_none=True)
    module(padded(), 0, 1.0).logprobs_BT.sum().backward()
    assert all(parameter.grad is None for parameter in module.critic.parameters())
    assert all(parameter.grad is not None for parameter in module.policy.parameters())


def test_training_mode_has_no_dropout() -> None:
    module = ActorCritic(make_policy(dropout=0.5)).train()
    assert torch.equal(module(padded(), 0, 1.0).logprobs_BT, module(padded(), 0, 1.0).logprobs_BT)


def test_reference_equals_the_untrained_policy_and_takes_no_gradient() -> None:
    module, reference = ActorCritic(make_policy()), Reference(make_policy())
    found = reference(padded(), 1, TEMPERATURE)
    assert torch.equal(found, module(padded(), 1, TEMPERATURE).logprobs_BT)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_without_a_critic_there_are_no_parameters_of_one_and_values_are_zero() -> None:
    with_one, without = ActorCritic(make_policy()), ActorCritic(make_policy(), critic=False)
    assert [name for name, _ in without.named_parameters() if not name.startswith("policy.")] == []
    assert without.critic_parameters() == []
    expected, found = with_one(padded(), 0, 1.0), without(padded(), 0, 1.0)
    assert torch.equal(found.logprobs_BT, expected.logprobs_BT)
    assert torch.equal(found.entropy_BT, expected.entropy_BT)
    assert found.values_BT.shape == expected.values_BT.shape
    assert bool((found.values_BT == 0).all())
