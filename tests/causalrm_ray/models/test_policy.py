from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from causalrm_ray.models.policy import ActorCritic, Reference
from causalrm_ray.models.token_batch import TokenBatch, TokenRow, make_batch

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


def batch(prompt: int = 1, rows: Sequence[Sequence[int]] = ROWS) -> TokenBatch:
    """Rows of which the first so many tokens are the prompt."""
    return make_batch([TokenRow(*torch.tensor(row).tensor_split([prompt])) for row in rows], torch.device("cpu"))


def test_logprobs_and_entropy_equal_one_row_at_a_time_without_padding() -> None:
    module = ActorCritic(make_policy())
    outputs = module(batch(), TEMPERATURE)
    for b, row in enumerate(ROWS):
        logits = module.policy(torch.tensor([row])).logits[0].double() / TEMPERATURE
        for t, token in enumerate(row[1:]):
            probs = [math.exp(float(logit)) for logit in logits[t]]
            assert float(outputs.logprobs_BR[b, t]) == pytest.approx(math.log(probs[token] / sum(probs)), rel=1e-4, abs=1e-5)
            expected = -sum(p / sum(probs) * math.log(p / sum(probs)) for p in probs)
            assert float(outputs.entropy_BR[b, t]) == pytest.approx(expected, rel=1e-4)


def test_pads_change_no_real_token_and_past_its_end_an_answer_repeats_its_last() -> None:
    module = ActorCritic(make_policy())
    module.value_head.weight.data.fill_(0.1)
    zeros, others = batch(), batch()
    others.inputs_BT[1, 3:] = 11
    for first, second in zip(module(zeros, 1.0), module(others, 1.0), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[1, 2:], first[1, 1].expand(3))


def test_a_longer_prompt_leaves_out_leading_tokens_only() -> None:
    module = ActorCritic(make_policy())
    for whole, late in zip(module(batch(), 1.0), module(batch(2), 1.0), strict=True):
        torch.testing.assert_close(late[0], whole[0, 1:])
        torch.testing.assert_close(late[1, 0], whole[1, 1])


def test_values_start_at_zero_and_read_only_tokens_before_the_action() -> None:
    module = ActorCritic(make_policy())
    assert module(batch(), 1.0).values_BR.abs().max() == 0
    module.value_head.weight.data.fill_(0.1)
    other = batch(rows=[[*ROWS[0][:3], 12, *ROWS[0][4:]], ROWS[1]])  # token 3 is the action of entry 2
    first, second = module(batch(), 1.0).values_BR, module(other, 1.0).values_BR
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
    module(batch(), 1.0).values_BR.sum().backward()
    assert all(parameter.grad is None for parameter in module.policy.parameters())
    module.zero_grad(set_to_none=True)
    module(batch(), 1.0).logprobs_BR.sum().backward()
    assert all(parameter.grad is None for parameter in module.critic.parameters())
    assert all(parameter.grad is not None for parameter in module.policy.parameters())


def test_training_mode_has_no_dropout() -> None:
    module = ActorCritic(make_policy(dropout=0.5)).train()
    assert torch.equal(module(batch(), 1.0).logprobs_BR, module(batch(), 1.0).logprobs_BR)


def test_reference_equals_the_untrained_policy_and_takes_no_gradient() -> None:
    module, reference = ActorCritic(make_policy()), Reference(make_policy())
    found = reference(batch(), TEMPERATURE)
    assert torch.equal(found, module(batch(), TEMPERATURE).logprobs_BR)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_without_a_critic_there_are_no_parameters_of_one_and_values_are_zero() -> None:
    with_one, without = ActorCritic(make_policy()), ActorCritic(make_policy(), critic=False)
    assert [name for name, _ in without.named_parameters() if not name.startswith("policy.")] == []
    assert without.critic_parameters() == []
    expected, found = with_one(batch(), 1.0), without(batch(), 1.0)
    assert torch.equal(found.logprobs_BR, expected.logprobs_BR)
    assert torch.equal(found.entropy_BR, expected.entropy_BR)
    assert found.values_BR.shape == expected.values_BR.shape
    assert bool((found.values_BR == 0).all())
