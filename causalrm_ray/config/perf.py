"""Options of `perf`: a tree of its own, read like the main one. Every default lives here and only here."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from causalrm_ray.config.base import ClusterConfig, Distinct, RunFolder, Section

Part = Literal["rollout", "sync", "learner", "driver", "trl", "asynchronous", "memory"]
Case = tuple[Literal["0.94M", "26M"], int, int]
SAMPLES = 8  # answers per prompt
WARM_STEPS = 20  # of the memory part, after which nothing should grow


class PerfConfig(Section):
    """How fast the parts of a step are, each against the same work done without us, on randomly initialised Llamas."""

    parts: Annotated[tuple[Part, ...], Distinct] = Field(
        get_args(Part), min_length=1, description="what to measure; trl needs the extra [perf]"
    )
    cases: Annotated[tuple[Case, ...], Distinct] = Field(
        (("0.94M", 32, 64), ("26M", 32, 64), ("0.94M", 128, 192)),
        min_length=1,
        description="[parameters, answers per step, tokens per answer]: [[0.94M,32,64],[26M,32,64]]; memory takes the first",
    )
    pairs: int = Field(5, ge=1, description="measurements of ours and of the other, in turn, under each median")
    engine: Literal["vllm", "hf"] = Field("vllm", description="inference engine of ours, but for `rollout`, which is vLLM's")
    generators: int = Field(1, ge=1, description="generator actors of the whole loop")
    ranks: int = Field(1, ge=1, description="learner ranks of the whole loop")
    trl_threads: int = Field(1, ge=1, description="threads that TRL's trainer computes with; each of our roles has one")
    memory_steps: int = Field(
        200, gt=WARM_STEPS, description=f"steps over which the driver's memory is watched, from step {WARM_STEPS} on"
    )
    run: RunFolder = RunFolder()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("cases")
    @classmethod
    def _whole_groups(cls, cases: tuple[Case, ...]) -> tuple[Case, ...]:
        for _, answers, tokens in cases:
            if answers < SAMPLES or answers % SAMPLES or tokens < 1:
                raise ValueError(f"answers must be a multiple of {SAMPLES}, tokens at least 1, got {answers} and {tokens}")
        return cases
