"""LoRA (Hu et al. 2021) through peft: the weights stay as they are, and low-rank factors beside each linear layer are trained.

Policy, critic and reference are separate trees of modules over the same frozen parameters: memory holds the model once, and
no adapter is ever switched, which a forward pass that is computed again during the backward pass would not survive.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

SCALE = 2.0  # alpha / rank: how much of B A is added to a weight
ADAPTER = "default"  # peft's name for it inside a model
FACTORS = ("lora_A", "lora_B")
FILE = "adapter_model.safetensors"


class Weight(NamedTuple):
    """One weight of a model: its parameter or, with an adapter, its parameter, A [r, in] and B [out, r]."""

    parameters: tuple[nn.Parameter, ...]
    transposed: bool = False  # a Conv1D keeps its weight as [in, out]

    def value(self) -> torch.Tensor:
        """The weight of a model without adapter: W + SCALE B A, computed in float32. The parameters must be whole."""
        weight, *factors = (parameter.detach() for parameter in self.parameters)
        if not factors:
            return weight
        a, b = (factor.float() for factor in factors)
        change = SCALE * (b @ a)
        return (weight.float() + (change.T if self.transposed else change)).to(weight.dtype)


def with_adapter(model: PreTrainedModel, rank: int, seed: int) -> Any:
    """Another tree of modules over the parameters of `model`, now frozen, with an adapter at each linear layer but the output's.

    B starts at 0, so both compute the same; A is drawn from `seed`. Adapters have the dtype of their layer.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules="all-linear", lora_dropout=0.0)
    config.base_model_name_or_path = model.config._name_or_path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, twin, ADAPTER)


def weights_of(plain: nn.Module, adapted: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The weights of `adapted` under the names of `plain`, the same model without adapters; a tied weight comes once."""
    layers = _layers(adapted)
    for name, parameter in plain.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            yield name, Weight((parameter,))
        else:
            yield name, Weight((parameter, *(_factor(layer, part) for part in FACTORS)), layer.fan_in_fan_out)


def adapter_of(adapted: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The factors alone, under the names of peft's files."""
    for name, layer in _layers(adapted).items():
        for part in FACTORS:
            yield f"base_model.model.{name}.{part}.weight", Weight((_factor(layer, part),))


def save_adapter(folder: Path, adapted: Any, factors: Mapping[str, torch.Tensor]) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads: `factors` by the names of `adapter_of`, and their settings."""
    config = copy.copy(adapted.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(dict(factors), Path(folder) / FILE, metadata={"format": "pt"})


def _layers(adapted: nn.Module) -> dict[str, Linear]:
    return {name: layer for name, layer in adapted.named_modules() if isinstance(layer, Linear)}


def _factor(layer: Linear, part: str) -> nn.Parameter:
    return layer.get_parameter(f"{part}.{ADAPTER}.weight")
