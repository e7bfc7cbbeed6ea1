"""Options of the capacity planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from causalrm_ray.config.base import AlgorithmName, LoraTargetNames, RunFolder, Section
from causalrm_ray.registry import ALGORITHMS
from causalrm_ray.types import RewardTuning

Gpu = Literal["A100", "H100", "H200", "L4"]


class ShapeConfig(Section):
    """A Llama-like model that exists only as numbers."""

    parameters: float = Field(8.0e9, gt=0, description="parameters, all of them")
    layers: int = Field(32, ge=1, description="decoder layers")
    hidden: int = Field(4096, ge=1, description="hidden units")
    vocabulary: int = Field(128_256, ge=1, description="tokens of the vocabulary")
    kv_width: int = Field(2048, ge=1, description="numbers kept per token and layer: 2 x key-value heads x head size")
    tied: bool = Field(False, description="whether the output head is the embedding")


SMALL = {"parameters": 1.24e9, "layers": 16, "hidden": 2048, "kv_width": 1024, "tied": True}  # Llama 3.2 1B


class HardwareConfig(Section):
    """The GPUs; a figure that is null is that of the kind."""

    kind: Gpu = Field("H100", description="figures to begin with: A100 (80 GB), H100 and H200 (SXM), L4")
    gpus: int = Field(8, ge=1, description="GPUs in all")
    memory_gb: float | None = Field(None, gt=0, description="memory of one, 10^9 bytes")
    tflops: float | None = Field(None, gt=0, description="dense bfloat16 TFLOP/s of one")
    hbm_gb_s: float | None = Field(None, gt=0, description="memory bandwidth of one, GB/s")
    link_gb_s: float | None = Field(None, gt=0, description="bandwidth between two in one direction, GB/s")
    price: float | None = Field(None, ge=0, description="dollars an hour for one")
    sync_gb_s: float = Field(2.0, gt=0, description="assumed rate of a weight sync through host memory, GB/s")
    host_gb: float = Field(1000.0, gt=0, description="memory of all hosts together, 10^9 bytes")


class EfficiencyConfig(Section):
    """Which share of the GPU's figures is reached, as assumed where nothing was measured."""

    training: float = Field(0.35, gt=0, le=1, description="of TFLOP/s, in training")
    forward: float = Field(0.45, gt=0, le=1, description="of TFLOP/s, in prefill, scoring and feature extraction")
    decoding: float = Field(0.6, gt=0, le=1, description="of the memory bandwidth, in decoding")


class PlanConfig(Section):
    """How much memory, time and money a training run will take."""

    model: str | None = Field(None, description="policy: folder or hub id; null: the numbers of `shape`")
    reward: str | None = Field(None, description="backbone of reward and propensity: folder or hub id; null: `reward_shape`")
    shape: ShapeConfig = ShapeConfig()
    reward_shape: ShapeConfig = ShapeConfig.model_validate(SMALL)
    hardware: HardwareConfig = HardwareConfig()
    efficiency: EfficiencyConfig = EfficiencyConfig()
    measured: Path | None = Field(None, description="perf.json of `perf` on this hardware; its rates replace what is assumed")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="precision of policy and engine weights")
    prompt_tokens: int = Field(512, ge=1, description="tokens of a prompt")
    answer_tokens: int = Field(512, ge=1, description="tokens of an answer")
    prompts: int = Field(64, ge=1, description="prompts per step")
    samples: int = Field(8, ge=1, description="answers per prompt")
    steps: int = Field(200, ge=1, description="policy steps")
    generators: int = Field(3, ge=1, description="generator actors")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one generator")
    ranks: int = Field(4, ge=1, description="learner ranks")
    algorithm: AlgorithmName = Field("grpo", description="ppo has a critic")
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="ZeRO stage")
    lora: int = Field(0, ge=0, description="rank of the adapter; 0: full tuning")
    lora_targets: LoraTargetNames = Field("auto", description="linear layers with an adapter by name; needs `model`")
    checkpointing: bool = Field(True, description="activations computed twice")
    epochs: int = Field(1, ge=1, description="passes over a step's answers")
    staleness: Literal[0, 1] = Field(0, description="1: the next answers are written while the learner trains")
    log_events: int = Field(1_000_000, ge=1, le=10**12, description="impressions in the log")
    log_rows: int | None = Field(None, ge=1, description="impressions that a fit reads; null: all")
    tune: RewardTuning = Field("head", description="as reward.tune of the fit: heads on states, or the whole backbone")
    reward_epochs: int = Field(4, ge=1, description="passes over the log of tune=full")
    workers: int = Field(1, ge=1, description="GPUs of tune=full; states are computed on all GPUs in the first fit, on one later")
    refits: int = Field(0, ge=0, description="fits on the grown log during the run, besides the first")
    new_rows: float = Field(0.01, ge=0, le=1, description="share of the log that is new at each refit")
    run: RunFolder = RunFolder()

    @field_validator("reward_shape", mode="before")
    @classmethod
    def _change_the_small_shape(cls, given: Any) -> Any:
        return {**SMALL, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _groups(self) -> PlanConfig:
        if self.samples < 2 and ALGORITHMS.load(self.algorithm).grouped:
            raise ValueError(f"samples must be at least 2 with algorithm={self.algorithm}, got {self.samples}")
        if self.lora_targets != "auto" and not (self.lora and self.model):
            raise ValueError("lora_targets needs lora, at least 1, and the names of a `model`, got one without the others")
        if self.log_rows is not None and self.log_rows > self.log_events:
            raise ValueError(f"log_rows must be at most log_events={self.log_events}, got {self.log_rows}")
        return self
