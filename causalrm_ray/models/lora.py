"""LoRA (Hu et al. 2021) through peft: the weights stay as they are, and low-rank factors beside linear layers are trained.

Those of the language model alone. The experts of a mixture, which transformers keeps in one tensor per layer, stay frozen: peft
can adapt such tensors, but by computing the change of every expert in each forward pass, and not where ZeRO-3 splits them.

Policy, critic and reference are separate trees of modules over the same frozen parameters: memory holds the model once, and
no adapter is ever switched, which a forward pass that is computed again during the backward pass would not survive.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from causalrm_ray.types import LoraTargets

SCALE = 2.0  # alpha / rank: how much of B A is added to a weight
ADAPTER = "default"  # peft's name for it inside a model
FACTORS = ("lora_A", "lora_B")
PREFIX = "base_model.model."  # of a factor's name in peft's files
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


def linear_layers(model: PreTrainedModel, targets: LoraTargets = "auto") -> dict[str, nn.Linear | Conv1D]:
    """By name, the linear layers of a model's text decoder, without towers for other inputs and the output head; or those whose
    names, or the ends of whose paths, are `targets`.

    Raises ValueError for a target that is none of them.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = set(decoder.modules()) - {head}
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer in inside}
    if targets == "auto":
        return found
    targets = tuple(target.removeprefix(f"{model.base_model_prefix}.") for target in targets)  # a critic's names begin below it
    for target in targets:
        if not any(_is_named(name, target) for name in found):
            known = ", ".join(dict.fromkeys(_last(name) for name in found))
            raise ValueError(f"learner.lora_targets must name linear layers of the language model ({known}), got {target!r}")
    return {name: layer for name, layer in found.items() if any(_is_named(name, target) for target in targets)}


def with_adapter(model: PreTrainedModel, rank: int, seed: int, targets: LoraTargets = "auto") -> Any:
    """Another tree of modules over the parameters of `model`, now frozen, with an adapter at each of its `linear_layers`.

    B starts at 0, so both compute the same; A is drawn from `seed`. Adapters have the dtype of their layer. Raises
    ValueError where peft would adapt other weights, too: engines would not get those.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    layers = linear_layers(model, targets)
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=list(layers), lora_dropout=0.0)
    config.base_model_name_or_path = model.config._name_or_path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = inject_adapter_in_model(config, twin, ADAPTER)
    merged = {id(_factor(layer, part)) for layer in _layers(adapted).values() for part in FACTORS}
    trained = [(name, id(parameter)) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    if stray := next((name for name, key in trained if key not in merged), None):
        raise ValueError(
            f"LoRA on a {model.config.model_type} would adapt experts, too, such as {stray.partition('.lora_')[0]}: "
            "name layers whose names are no expert's by learner.lora_targets"
        )
    return adapted


def describe(plain: PreTrainedModel, adapted: nn.Module) -> str:
    """Which layers of `adapted`, made of `plain`, have adapters; and which others hold matrices, the largest first."""
    layers = _layers(adapted)
    kinds = Counter(_last(name) for name in layers)
    counts = dict.fromkeys(kinds.values())
    chosen = [f"{', '.join(kind for kind in kinds if kinds[kind] == count)} ({count} of each)" for count in counts]
    decoder = next(name for name, module in plain.named_modules() if module is plain.get_decoder())
    frozen: Counter[str] = Counter()
    for name, parameter in plain.named_parameters():
        path = name.rpartition(".")[0]
        if parameter.ndim > 1 and path not in layers:
            inside = not decoder or f"{path}.".startswith(f"{decoder}.")
            frozen[_last(path) if inside else _part_beside(decoder, path)] += parameter.numel()
    return f"{', '.join(chosen)}; frozen: {', '.join(name for name, _ in frozen.most_common())}"


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
            yield f"{PREFIX}{name}.{part}.weight", Weight((_factor(layer, part),))


def layer_of(factor: str) -> str:
    """The name of the layer, in its model, that a factor of such a name is beside."""
    return factor.removeprefix(PREFIX).rsplit(".", 2)[0]


def save_adapter(folder: Path, adapted: Any, factors: Mapping[str, torch.Tensor]) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads: `factors` by the names of `adapter_of`, and their settings."""
    config = copy.copy(adapted.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(dict(factors), Path(folder) / FILE, metadata={"format": "pt"})


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _part_beside(decoder: str, path: str) -> str:
    """The first name of `path` that leaves the path of the decoder: a vision tower's, say."""
    names, own = path.split("."), decoder.split(".")
    return next((name for place, name in enumerate(names) if own[place : place + 1] != [name]), path)


def _layers(adapted: nn.Module) -> dict[str, Linear]:
    return {name: layer for name, layer in adapted.named_modules() if isinstance(layer, Linear)}


def _factor(layer: Linear, part: str) -> nn.Parameter:
    return layer.get_parameter(f"{part}.{ADAPTER}.weight")
