"""Adapters and checkpointing on single modules; the learner's ranks train with them in tests/actors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from causalrm_ray.models.lora import adapter_of, describe, linear_layers, save_adapter, weights_of, with_adapter
from causalrm_ray.models.policy import ActorCritic
from causalrm_ray.models.token_batch import TokenRow, make_batch
from jobs.lab.families.builder import FAMILIES

TOKENS = torch.tensor([[3, 7, 1, 4, 9, 2], [5, 5, 8, 0, 0, 0]])
ANSWERS = [TokenRow(row[:2], row[2:]) for row in TOKENS]
BATCH = make_batch(ANSWERS, torch.device("cpu"))
RANK = 3
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.2, tie_word_embeddings=tied, **sizes)).eval()


def gpt2() -> GPT2LMHeadModel:
    """Its layers keep their weights transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()


def opt() -> OPTForCausalLM:
    """Its layers call dropout themselves."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    config = OPTConfig(vocab_size=16, max_position_embeddings=16, dropout=0.5, attention_dropout=0.5, **sizes)
    return OPTForCausalLM(config).eval()


def gemma3() -> PreTrainedModel:
    """It sees pictures, too: its vision tower has layers of the same names."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
    pictures = {**tower, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config).eval()


def move(module: nn.Module) -> nn.Module:
    """As training would, further."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def values(named) -> dict[str, torch.Tensor]:
    return {name: weight.value().clone() for name, weight in named}


def test_an_adapter_starts_as_nothing_at_every_linear_layer_over_the_same_memory() -> None:
    model = llama()
    expected, size = logits(model), sum(parameter.numel() for parameter in model.parameters())
    adapted = with_adapter(model, RANK, seed=0)
    assert torch.equal(logits(adapted), expected)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert {name.split(".")[-4] for name in trained} == set(LINEAR)
    assert len(trained) == 2 * 2 * len(LINEAR)  # A and B, two layers
    assert {min(value.shape) for value in trained.values()} == {RANK}
    held = {value.data_ptr(): value.numel() for tree in (model, adapted) for value in tree.parameters()}
    assert sum(held.values()) == size + sum(value.numel() for value in trained.values())
    assert not any(value.requires_grad for value in model.parameters())


def test_only_the_language_model_of_one_that_sees_pictures_gets_adapters() -> None:
    plain = gemma3()
    for model in (plain, plain.base_model):  # the policy's, and the critic's
        adapted = with_adapter(model, RANK, seed=0)
        trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
        assert len(trained) == 2 * 2 * len(LINEAR)
        assert all("language_model.layers." in name for name in trained)
    adapted = with_adapter(plain, RANK, seed=0)
    assert describe(plain, adapted) == (
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (2 of each); "
        "frozen: vision_tower, multi_modal_projector, embed_tokens"
    )


def test_what_a_mixture_keeps_frozen_is_named_the_largest_first() -> None:
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(
            FAMILIES["Mixtral"].config(vocab_size=200, bos_token_id=None, eos_token_id=1, pad_token_id=0)
        )
    found = describe(plain, with_adapter(plain, RANK, seed=0))
    assert found == "q_proj, k_proj, v_proj, o_proj (2 of each); frozen: experts, embed_tokens, lm_head, gate"


def test_adapters_stand_at_the_layers_that_are_named_by_name_or_by_path() -> None:
    plain = llama()
    adapted = with_adapter(plain, RANK, 0, ("q_proj", "layers.1.mlp.up_proj"))
    changed = [name.removesuffix(".weight") for name, weight in weights_of(plain, adapted) if len(weight.parameters) > 1]
    assert changed == [*(f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)), "model.layers.1.mlp.up_proj"]
    assert describe(plain, adapted).startswith("q_proj (2 of each), up_proj (1 of each); frozen: ")
    assert list(linear_layers(plain.base_model, ("q_proj",))) == [f"layers.{number}.self_attn.q_proj" for number in (0, 1)]
    for model in (plain, plain.base_model):  # the policy's, and the critic's, by the same path
        assert [name[-18:] for name in linear_layers(model, ("model.layers.1.mlp.up_proj",))] == ["layers.1.mlp.up_proj"[-18:]]


@pytest.mark.parametrize("target", ["lm_head", "proj", "query", "embed_tokens"])
def test_a_target_that_is_no_linear_layer_is_refused_by_name_with_those_that_there_are(target: str) -> None:
    message = rf"learner\.lora_targets must name linear layers of the language model \({', '.join(LINEAR)}\), got '{target}'"
    with pytest.raises(ValueError, match=message):
        with_adapter(llama(), RANK, 0, ("q_proj", target))


def test_peft_loads_an_adapter_of_some_layers_as_it_was(tmp_path: Path) -> None:
    adapted = move(with_adapter(gemma3(), RANK, 0, ("q_proj", "down_proj")))
    factors = values(adapter_of(adapted))
    save_adapter(tmp_path / "adapter", adapted, factors)
    loaded = PeftModel.from_pretrained(gemma3(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=0, atol=0)
    assert not torch.allclose(logits(loaded), logits(gemma3()), atol=1e-2)


def test_adapters_are_drawn_from_the_seed() -> None:
    one, same, other = (dict(with_adapter(llama(), RANK, seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    model, state = llama(), torch.get_rng_state()
    with_adapter(model, RANK, 9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2], ids=["llama", "tied", "gpt2"])
def test_merged_weights_are_those_of_a_naive_product_and_compute_what_the_adapted_model_does(make) -> None:
    plain = make()
    untouched = copy.deepcopy(plain).state_dict()
    adapted = move(with_adapter(plain, RANK, seed=0))
    before = copy.deepcopy(adapted).state_dict()
    merged = values(weights_of(plain, adapted))
    assert list(merged) == [name for name, _ in make().named_parameters()]
    layers = dict(adapted.named_modules())
    changed = 0
    for name, found in merged.items():
        layer, expected = layers.get(name.removesuffix(".weight")), untouched[name].double().numpy()
        if hasattr(layer, "lora_A"):
            a, b = (getattr(layer, part)["default"].weight.detach().double().numpy() for part in ("lora_A", "lora_B"))
            change = np.array(
                [[2.0 * sum(b[o, k] * a[k, i] for k in range(RANK)) for i in range(a.shape[1])] for o in range(len(b))]
            )
            expected, changed = expected + (change.T if make is gpt2 else change), changed + 1
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert changed == (8 if make is gpt2 else 14)
    loaded = make()
    loaded.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(plain), atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())  # the live ones stay
    assert all(torch.equal(value, merged[name]) for name, value in values(weights_of(plain, adapted)).items())


def test_bfloat16_weights_are_merged_in_float32_and_rounded_once() -> None:
    plain = llama().bfloat16()
    adapted = move(with_adapter(plain, RANK, seed=0))
    name = "model.layers.1.mlp.up_proj"
    layer = adapted.get_submodule(name)
    factors = (layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    w, a, b = (value.detach().double() for value in factors)
    found, expected = values(weights_of(plain, adapted))[f"{name}.weight"], w + 2 * b @ a
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - expected).abs() <= 2**-8 * expected.abs() * 1.001 + 1e-6).all())


def test_peft_loads_the_adapter_folder_onto_the_plain_model(tmp_path: Path) -> None:
    adapted = move(with_adapter(llama(), RANK, seed=0))
    factors = values(adapter_of(adapted))
    save_adapter(tmp_path / "adapter", adapted, factors)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == RANK
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=0, atol=0)


def test_reference_is_the_adapter_switched_off_and_each_objective_moves_its_own_adapter() -> None:
    expected = ActorCritic(llama())(BATCH, 0.7).logprobs_BR
    module = ActorCritic(llama(), lora=RANK)
    module.value_head.weight.data.fill_(0.1)
    move(module)
    found = module(BATCH, 0.7, reference=True)
    assert torch.equal(found.logprobs_BR, expected)
    assert not found.logprobs_BR.requires_grad
    outputs = module(BATCH, 0.7)
    assert not torch.allclose(outputs.logprobs_BR, expected, atol=1e-2)
    policy, critic = module.policy_parameters(), module.critic_parameters()
    outputs.values_BR.sum().backward()
    assert all(parameter.grad is None for parameter in policy)
    assert all(parameter.grad is not None for parameter in critic)
    module.zero_grad(set_to_none=True)
    module(BATCH, 0.7).logprobs_BR.sum().backward()
    assert all(parameter.grad is None for parameter in critic)
    assert {id(value) for value in module.parameters() if value.grad is not None} == {id(value) for value in policy}


def test_without_lora_there_is_no_reference_inside() -> None:
    with pytest.raises(ValueError, match="reference must be False without LoRA, got True"):
        ActorCritic(llama())(BATCH, 0.7, reference=True)


def test_the_state_holds_what_is_trained_and_goes_onto_another_module_over_the_same_model() -> None:
    module, other = move(ActorCritic(llama(), lora=RANK)), ActorCritic(llama(), lora=RANK)
    state = copy.deepcopy(module.state_dict())
    assert len(state) == len(module.policy_parameters()) + len(module.critic_parameters())
    other.load_state_dict(state)
    for found, expected in zip(other(BATCH, 1.0), module(BATCH, 1.0), strict=True):
        assert torch.equal(found, expected)
    state.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key.*value_head"):
        other.load_state_dict(state)


def gradients(module: ActorCritic) -> tuple[dict[str, torch.Tensor], int]:
    """(gradients by name, bytes kept for the backward pass)."""
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        outputs = module(make_batch(ANSWERS * 8, torch.device("cpu")), 0.7)
    (outputs.logprobs_BR.sum() + outputs.values_BR.square().sum()).backward()
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    return (
        {name: value.grad for name, value in module.named_parameters() if value.grad is not None},
        sum(size for place, size in kept.items() if place not in weights),
    )


@pytest.mark.parametrize("make", [llama, gpt2, opt])
@pytest.mark.parametrize("lora", [0, RANK])
def test_checkpointing_keeps_less_and_finds_the_same_gradient(make, lora: int) -> None:
    usual, saving = (ActorCritic(make(), lora=lora, checkpointing=saves) for saves in (False, True))
    for module in (usual, saving):
        module.train()
        module.value_head.weight.data.fill_(0.1)
        move(module)
    expected, kept = gradients(usual)
    found, kept_saving = gradients(saving)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept_saving < 0.5 * kept
