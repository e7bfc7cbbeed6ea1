from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers import PreTrainedModel as Model

from causalrm_ray.models.policy import ActorCritic, Reference
from causalrm_ray.models.token_batch import TokenRow, make_batch, shares_prompts

CPU = torch.device("cpu")
PROMPTS = ((3, 7, 1, 4), (5, 8))
ANSWERS = ((0, (9, 2, 6)), (1, (4, 4, 1, 7, 2)), (0, (2,)), (1, (1, 3)), (0, (9, 9, 5, 2)))  # (prompt, tokens)
TEMPERATURE = 0.7


def row(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> TokenRow:
    return TokenRow(torch.tensor(prompt), torch.tensor(tokens))


def rows() -> list[TokenRow]:
    return [row(PROMPTS[number], tokens) for number, tokens in ANSWERS]


def llama() -> Model:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=48, initializer_range=0.3, **sizes))


def gpt2() -> Model:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3))


def opt() -> Model:
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=16, hidden_size=32, ffn_dim=48, init_std=0.3, **sizes))


def module_of(make: Callable[[], Model], lora: int = 0) -> ActorCritic:
    torch.manual_seed(0)
    module = ActorCritic(make(), lora=lora)
    for parameter in [*module.policy_parameters(), *module.critic_parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def test_prompts_are_read_once_and_answers_follow_theirs() -> None:
    batch = make_batch(rows(), CPU, share=True)
    assert batch.prompts is not None
    assert batch.prompts.ids_PL.tolist() == [[3, 7, 1], [5, 0, 0]]
    assert batch.prompts.of_B.tolist() == [0, 1, 0, 1, 0]
    assert batch.prompts.mask_BC[:2].tolist() == [[1] * 8, [1, 0, 0, 1, 1, 1, 1, 1]]
    assert batch.prompts.positions_BT[:2].tolist() == [[3, 4, 5, 6, 7], [1, 2, 3, 4, 5]]
    assert batch.inputs_BT[:2].tolist() == [[4, 9, 2, 6, 0], [8, 4, 4, 1, 7]]
    assert batch.targets_BK[:2].tolist() == [[9, 2, 6, 0, 0], [4, 4, 1, 7, 2]]
    assert batch.answer_BR[0].tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("make", [llama, gpt2, opt])
@pytest.mark.parametrize("lora", [0, 2])
def test_sharing_prompts_changes_neither_outputs_nor_gradients(make: Callable[[], Model], lora: int) -> None:
    found = []
    for share in (False, True):
        module, batch = module_of(make, lora), make_batch(rows(), CPU, share)
        assert (batch.prompts is not None) == share
        outputs = module(batch, TEMPERATURE)
        reference = module(batch, TEMPERATURE, True).logprobs_BR if lora else Reference(make())(batch, TEMPERATURE)
        assert reference.shape == outputs.logprobs_BR.shape
        (outputs.logprobs_BR.square().sum() + outputs.values_BR.square().sum()).backward()
        found.append((outputs, {name: value.grad for name, value in module.named_parameters() if value.grad is not None}))
    (flat, gradients), (shared, others) = found
    for one, other in zip(flat, shared, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():  # float32 sums in another order; that of a key's bias is 0 but for rounding
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize(
    "prompts",
    [((3,), (5, 8)), tuple((number, 2) for number in range(5))],
    ids=["a prompt of one token has none to read before", "few answers share a prompt"],
)
def test_what_gains_nothing_is_read_whole(prompts: tuple[tuple[int, ...], ...]) -> None:
    found = [row(prompts[place % len(prompts)], tokens) for place, (_, tokens) in enumerate(ANSWERS)]
    assert make_batch(found, CPU, share=True).prompts is None


def test_models_that_forget_a_prompt_and_layers_that_are_computed_again_share_none() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    windowed = MistralConfig(vocab_size=16, sliding_window=4, num_hidden_layers=1, **sizes)
    assert not shares_prompts(MistralForCausalLM(windowed))
    with_state = MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1)
    assert not shares_prompts(MambaForCausalLM(with_state))
    assert ActorCritic(llama()).shares_prompts
    assert not ActorCritic(llama(), checkpointing=True).shares_prompts
