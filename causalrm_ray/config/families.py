"""Options of `families`: a tree of its own, read like the main one. Every default lives here and only here."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from causalrm_ray.config.base import Distinct, EngineName, RunFolder, Section

FamilyName = Literal[
    "Llama 2",
    "Llama 3",
    "Mistral",
    "Mixtral",
    "Qwen2.5",
    "Qwen3",
    "Qwen3-MoE",
    "Gemma 1",
    "Gemma 2",
    "Gemma 3",
    "Gemma 3 with images",
    "Phi-3",
    "GPT-2",
    "GPT-NeoX",
    "OPT",
    "OLMo 2",
    "Falcon",
    "GPT-OSS",
    "DeepSeek-V3",
]
FamilyPart = Literal["engines", "reward", "learner"]


class FamiliesConfig(Section):
    """A tiny model of each family, with random weights, through everything that a run does with a model."""

    families: Annotated[tuple[FamilyName, ...], Distinct] = Field(
        get_args(FamilyName), min_length=1, description="families of models: [Llama 3,Gemma 2]"
    )
    engines: Annotated[tuple[EngineName, ...], Distinct] = Field(("vllm", "hf"), description="inference engines")
    parts: Annotated[tuple[FamilyPart, ...], Distinct] = Field(
        get_args(FamilyPart),
        min_length=1,
        description="engines: log-probabilities and weight syncs; reward: a saved reward model in other libraries, and its "
        "scores by every path; learner: a step under ZeRO 3, a checkpoint, a saved policy",
    )
    timeout_s: float = Field(300.0, gt=0, description="longest wait for any one phase of an engine, seconds")
    run: RunFolder = RunFolder()
