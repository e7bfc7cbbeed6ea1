"""The plan of roles: who sits where, what fits, and what is said where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actors.placement_plan import GIB, Plan, make_plan
from actors.rollout.engine import DEVICE_SHARE
from actors.system import ALL_ROLES
from causalrm_ray.config.options import load_config
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError
from causalrm_ray.models.lora import with_adapter
from causalrm_ray.models.size import ModelSize, model_size
from causalrm_ray.rl.batching import TOKEN_BUDGET

SIZE = ModelSize(parameters=1000, backbone=800, layers=2, hidden=10, vocabulary=20, linear_widths=50, kv_width=6)
LARGE = ModelSize(
    8_000_000_000, 7_500_000_000, layers=32, hidden=4096, vocabulary=128_000, linear_widths=2_000_000, kv_width=2048
)


def config(*options: str) -> Config:
    return load_config(None, ["rollout.generators=2", "learner.ranks=2", "reward.workers=2", *options])


def plan(gpus: int, *options: str) -> Plan:
    return make_plan(config(*options), SIZE, SIZE, ALL_ROLES, gpus)


@pytest.mark.parametrize(
    ("width", "ranks", "stage", "critic", "expected"),
    [
        (4, 1, 0, False, 4_000 + 16_000),  # the reference 4; weights 4, gradients 4, moments 8 bytes of each
        (4, 4, 0, True, 4_000 + 16 * 1800),  # the critic is a backbone more
        (2, 1, 0, False, 2_000 + 16_000),  # 2 + 2 + 8 + 4 of the float32 copy
        (2, 4, 1, False, 2_000 + 7_000),  # 2 + 2 + 12 / 4
        (2, 4, 2, False, 2_000 + 5_500),
        (2, 4, 3, False, 2_000 + 4_000),
    ],
)
def test_training_bytes_by_hand(width: int, ranks: int, stage: int, critic: bool, expected: int) -> None:
    assert SIZE.training_bytes(width, ranks, stage, critic) == expected


def test_what_adapters_and_offload_leave_by_hand() -> None:
    assert SIZE.training_bytes(4, 1, 0, True, lora=3) == 4_000 + 16 * 2 * 3 * 50
    assert SIZE.training_bytes(2, 4, 1, False, offload=True) == 2_000 + 4_000
    assert SIZE.training_bytes(2, 4, 3, False, offload=True) == 2_000 + 500
    assert SIZE.activation_bytes(2, 5, checkpointing=True) == 5 * (2 * 2 * 10 + 34 * 10 + 20 * 4 * 4)


def test_activation_and_cache_bytes_by_hand() -> None:
    assert SIZE.cache_bytes(2, 3) == 3 * 2 * 6 * 2
    assert SIZE.activation_bytes(2, 5) == 5 * (2 * 34 * 10 + 20 * 4 * 4)
    assert SIZE.activation_bytes(4, 5, critic=True) == 5 * (2 * 2 * 68 * 10 + 20 * 4 * 4)
    assert SIZE.activation_bytes(4, 5, training=False) == 5 * 68 * 10


@pytest.mark.parametrize("tied", [False, True])
def test_a_size_is_that_of_the_loaded_model(tied: bool, tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    model, size = AutoModelForCausalLM.from_pretrained(tmp_path), model_size(str(tmp_path))
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.backbone == sum(parameter.numel() for parameter in model.base_model.parameters())
    assert (size.layers, size.hidden, size.vocabulary) == (3, 64, 50)
    for targets in ("auto", ("q_proj", "down_proj")):
        adapted = with_adapter(model, 3, 0, targets)
        trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
        assert 3 * model_size(str(tmp_path), targets).linear_widths == trained
    kept = model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    bytes_kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert size.cache_bytes(4, 7) == bytes_kept


def test_a_size_counts_the_layers_for_adapters_of_models_that_keep_weights_transposed(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    assert model_size(str(tmp_path)).linear_widths == (64 + 3 * 64) + (64 + 64) + 2 * (64 + 4 * 64)


def test_without_gpus_all_roles_are_seated_on_the_cpu() -> None:
    found = plan(0)
    assert set(found.allocations) == {
        *("generator-0", "generator-1", "learner-0", "learner-1", "features-0", "reward", "propensity"),
        *("reward worker 0", "reward worker 1"),
    }
    assert all(seat.bundle is None and seat.gpus == 0 for seat in found.allocations.values())
    assert (list(found.bundles), found.fits_on_gpu, found.colocated) == ([], False, False)


def test_with_enough_gpus_nobody_shares_but_the_reward_roles() -> None:
    found = plan(5)
    assert found.bundles == [1, 1, 1, 1, 1]
    places = {role: (seat.bundle, seat.gpus) for role, seat in found.allocations.items() if seat.bundle is not None}
    assert places == {
        **{"generator-0": (0, 1), "generator-1": (1, 1), "learner-0": (2, 1), "learner-1": (3, 1)},
        **{"reward": (4, 0.5), "features-0": (4, 0.5)},
    }
    assert not found.fits_on_gpu
    assert plan(7).fits_on_gpu


@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_with_fewer_gpus_roles_share_and_no_two_ranks_one(gpus: int) -> None:
    found = plan(gpus)
    assert found.colocated
    assert {found.allocations[f"learner-{rank}"].bundle for rank in range(2)} == {0, 1}
    for bundle in range(len(found.bundles)):
        assert sum(seat.gpus for seat in found.allocations.values() if seat.bundle == bundle) == pytest.approx(1)


def test_a_generator_over_several_gpus_has_them_in_one_group() -> None:
    found = plan(7, "rollout.tensor_parallel=2")
    assert found.bundles == [2, 2, 1, 1, 1]
    assert found.allocations["generator-1"].gpus == 2


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (1, [], r"learner\.ranks must be at most the cluster's 1 GPUs, got 2"),
        (6, ["rollout.tensor_parallel=2"], r"tensor_parallel=2 with .*=2 and learner\.ranks=2 needs 7 GPUs .* the cluster has 6"),
    ],
)
def test_too_few_gpus_are_refused_with_what_to_change(gpus: int, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(gpus, *options)


def test_weights_are_broadcast_where_generators_and_rank_0_have_gpus_of_their_own() -> None:
    assert plan(5).transport == "broadcast"
    assert plan(7, "rollout.tensor_parallel=2").transport == "broadcast"
    assert plan(0).transport == "object"
    assert plan(4).transport == "ipc"  # each generator beside a rank
    assert plan(4).partners == {"generator-0": 0, "generator-1": 1}
    assert plan(1, "learner.ranks=1").partners == {"generator-0": 0, "generator-1": 0}
    assert plan(4, "learner.zero_stage=3").transport == "object"  # a rank has but its part
    assert plan(3, "rollout.generators=3").transport == "object"  # generator-2 has no rank beside it
    assert plan(4, "rollout.engine=hf").transport == plan(4, "learner.lora=4").transport == "object"
    assert plan(5, "rollout.engine=hf").transport == "object"
    assert plan(5, "learner.lora=4").transport == "object"
    assert make_plan(config(), SIZE, SIZE, ("generators",), 5).transport == "object"


def test_two_buckets_of_a_broadcast_are_planned_with_on_each_gpu_that_takes_part() -> None:
    own, shared = plan(5).allocations, plan(4).allocations
    assert own["generator-1"].bytes - shared["generator-1"].bytes == 512 * 2**20
    assert own["learner-0"].bytes - own["learner-1"].bytes == 512 * 2**20
    assert shared["learner-0"].bytes == shared["learner-1"].bytes
    wide = [
        plan(7, "rollout.tensor_parallel=2", *options).allocations["generator-0"].bytes for options in ((), ("learner.lora=4",))
    ]
    assert wide[0] - wide[1] == 2 * 512 * 2**20


def test_roles_of_a_job_are_planned_alone() -> None:
    found = make_plan(config(), SIZE, SIZE, ("log", "reward"), 1)
    assert {role: seat.gpus for role, seat in found.allocations.items() if seat.gpus} == {"reward": 0.5, "features-0": 0.5}


def test_a_fit_alone_computes_states_on_every_gpu() -> None:
    found = make_plan(config(), SIZE, SIZE, ("log", "reward"), 3)
    seats = {role: (seat.bundle, seat.gpus) for role, seat in found.allocations.items() if seat.gpus}
    assert seats == {"features-0": (0, 1), "features-1": (1, 1), "features-2": (2, 0.5), "reward": (2, 0.5)}
    tuned = make_plan(config("reward.tune=full"), SIZE, SIZE, ("log", "reward"), 4)
    assert sum(role.startswith("features") for role in tuned.allocations) == 2
    assert (list(tuned.bundles), tuned.fits_on_gpu) == ([1, 1], True)


def test_what_does_not_fit_is_refused_with_what_to_change() -> None:
    small = plan(0)
    small.check_memory(small.host_bytes, 0)
    with pytest.raises(
        ConfigError, match=r"the roles need about .* the cluster has 1\.0, and .* alone takes .*: lower rollout\.generators"
    ):
        small.check_memory(GIB, 0)
    large = make_plan(config("model.dtype=bfloat16", "learner.zero_stage=3"), LARGE, SIZE, ALL_ROLES, 5)
    needed = large.allocations["learner-0"].bytes
    large.check_memory(200 * GIB, needed / DEVICE_SHARE + 1)
    with pytest.raises(ConfigError, match=r"learner-0 need about .* GiB on 1 GPU, .* raise learner\.zero_stage"):
        large.check_memory(200 * GIB, needed / DEVICE_SHARE - GIB)


def test_a_learner_is_planned_with_the_tokens_of_its_step_where_these_are_fewer_than_a_batch_may_hold() -> None:
    step = ("rollout.samples_per_prompt=2", "model.max_length=100", "learner.algorithm=grpo")
    small, large = (plan(0, *step, f"rollout.prompts_per_step={prompts}") for prompts in (8, 1000))
    kept = [SIZE.activation_bytes(4, tokens) for tokens in (8 * 100, TOKEN_BUDGET)]
    assert large.allocations["learner-0"].bytes - small.allocations["learner-0"].bytes == kept[1] - kept[0]


@pytest.mark.parametrize(("length", "tokens"), [(50, 64 * 50), (1000, 4096 + 2048), (3000, 4096 + 3000)])
def test_a_worker_that_tunes_a_whole_model_is_planned_with_what_a_batch_keeps(length: int, tokens: int) -> None:
    tuned, heads = (
        plan(0, f"model.max_length={length}", f"reward.tune={tune}").allocations["reward worker 0"].bytes
        for tune in ("full", "head")
    )
    assert tuned - heads == 4_000 + 20_000 + tokens * 2 * 68 * 10
