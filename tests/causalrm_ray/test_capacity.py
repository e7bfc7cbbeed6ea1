"""Seconds by hand numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from causalrm_ray.capacity import (
    Rates,
    Work,
    bottleneck,
    calibrated,
    fit,
    generation_s,
    llama_size,
    prepare_s,
    scoring_s,
    step,
    sync_s,
    update_s,
)
from causalrm_ray.models.size import ModelSize

SIZE = ModelSize(parameters=1000, backbone=800, layers=2, hidden=10, vocabulary=20, linear_widths=50, kv_width=6)
RATES = Rates(training=1e3, forward=2e3, decoding=1e3, link=1e3, sync=1e3, factors={})
WORK = Work(
    policy=SIZE,
    reward=SIZE,
    width=2,
    prompts=2,
    samples=4,
    prompt_tokens=10,
    answer_tokens=5,
    sequences=4,
    budget=100,
    shared=False,
)


def test_a_prompt_is_read_once_and_answers_are_written_in_waves_bound_by_operations_or_by_memory() -> None:
    prefill = 2 * 1000 * 2 * 10 / 2e3  # two prompts
    assert generation_s(WORK, RATES) == prefill + 2 * 5 * (2 * 1000 * 4 / 2e3)  # two waves of four answers
    moved = (1000 * 2 + 4 * (10 + 5 / 2) * 2 * 6 * 2) / 500
    assert generation_s(WORK, replace(RATES, decoding=500)) == prefill + 2 * 5 * moved
    spread = replace(WORK, generators=2, tensor_parallel=2)
    assert generation_s(spread, RATES) == prefill / 4 + 5 * (2 * 1000 * 4 / 4e3)


def test_passes_of_the_reward_model_and_the_learner() -> None:
    assert scoring_s(WORK, RATES) == 2 * 1000 * 120 / 2e3
    assert prepare_s(WORK, RATES) == 2 * 2000 * 120 / 2e3
    assert prepare_s(replace(WORK, critic=True), RATES) == 2 * 2800 * 120 / 2e3
    assert update_s(WORK, RATES) == 6 * 1000 * 120 / 1e3
    assert update_s(replace(WORK, epochs=2, critic=True), RATES) == 2 * 6 * 1800 * 120 / 1e3
    assert update_s(replace(WORK, lora=3), RATES) == 4 * 1000 * 120 / 1e3
    assert update_s(replace(WORK, checkpointing=True), RATES) == 8 * 1000 * 120 / 1e3


def test_zero_3_passes_the_weights_around_for_each_micro_batch() -> None:
    spread = replace(WORK, ranks=2, zero_stage=3, budget=25)  # 60 tokens a rank: 3 micro-batches
    once = 1000 * 2 / 2 / 1e3
    assert update_s(spread, RATES) == 6 * 1000 * 60 / 1e3 + 3 * 3 * once
    assert prepare_s(spread, RATES) == 2 * 2000 * 60 / 2e3 + 2 * 3 * once
    assert update_s(replace(spread, zero_stage=2), RATES) == 6 * 1000 * 60 / 1e3


def test_a_sync_moves_all_weights_or_the_adapter_and_takes_no_less_than_measured() -> None:
    assert sync_s(WORK, RATES) == 2.0
    assert sync_s(replace(WORK, lora=3), RATES) == 3 * 50 * 2 / 1e3
    assert sync_s(WORK, replace(RATES, sync_s=1.0, sync_bytes=1500)) == 1.5
    assert sync_s(WORK, replace(RATES, sync_s=1.0, sync_bytes=4000)) == 1.0


def test_what_goes_on_at_once_hides_behind_the_longest_unless_gpus_are_shared() -> None:
    assert step(WORK, RATES).wall == {"preparing": 240, "update": 720, "sync": 2}
    assert step(replace(WORK, shared=True), RATES).seconds == 60 + 120 + 240 + 720 + 2
    slow = replace(RATES, decoding=10)  # generation 20 + 2 * 5 * 320
    assert step(WORK, slow).wall == {"generation": 3220, "update": 720, "sync": 2}
    assert step(replace(WORK, staleness=1), slow).wall == {"generation": 3220, "sync": 2}
    assert step(replace(WORK, staleness=1), RATES).wall == {"preparing": 240, "update": 720, "sync": 2}
    driven = step(WORK, replace(RATES, driver_share=0.5))
    assert driven.wall["driver"] == 962
    assert driven.seconds == 2 * 962


def test_a_fit_reads_new_rows_for_states_and_all_of_them_for_heads_and_distillation() -> None:
    found = fit(SIZE, rows=10, new=5, tokens=10, epochs=4, gpus=(2, 2), rates=RATES)
    backbone = SIZE.backbone
    heads = 6 * 8 * 10 * (5 * 33 * SIZE.hidden) * 10 / 1e11
    assert found == pytest.approx(
        {"features": 2 * backbone * 50 / 4e3, "heads": heads, "distillation": 6 * 4 * backbone * 100 / 2e3}
    )
    assert fit(SIZE, rows=10, new=5, tokens=10, epochs=0, gpus=(2, 2), rates=RATES)["distillation"] == 0


def test_measured_work_takes_as_long_as_it_took_and_other_work_in_proportion() -> None:
    rates = calibrated(RATES, {"generation": (WORK, 120.0), "learner": (WORK, 480.0)})
    assert generation_s(WORK, rates) == 120.0
    assert prepare_s(WORK, rates) + update_s(WORK, rates) == 480.0
    assert scoring_s(WORK, rates) == 60.0
    assert update_s(replace(WORK, epochs=3), rates) == 3 * 360.0
    assert calibrated(RATES, {}) == RATES


def test_the_longest_phase_is_named_with_its_share() -> None:
    name, share, cure = bottleneck({"generation": 1.0, "update": 3.0})
    assert (name, share) == ("update", 0.75)
    assert "learner ranks" in cure


def test_the_numbers_of_a_known_model() -> None:
    size = llama_size(8_030_261_248, 32, 4096, 128_256, 2048, False)  # Llama 3 8B: three layers of 4096 x 14336
    assert size.linear_widths == pytest.approx(32 * (6 * 4096 + 2048 + 3 * (4096 + 14_336)), rel=1e-4)
    assert size.backbone == 8_030_261_248 - 128_256 * 4096
    with pytest.raises(ValueError, match=r"shape\.parameters must exceed those of embeddings and attention"):
        llama_size(1e9, 32, 4096, 128_256, 2048, False)
