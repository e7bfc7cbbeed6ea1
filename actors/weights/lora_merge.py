"""Adapters on their way to an engine that takes whole weights: only the factors travel, and are merged where they arrive.

learner rank 0: adapter --> Weights of the factors --> Merger: frozen model + factors --> Weights of the whole model --> engine
"""

from __future__ import annotations

import torch

from actors.weights.packing import Weights, pack, unpack, verify
from causalrm_ray.models.lora import FACTORS, adapter_of, layer_of, weights_of, with_adapter
from causalrm_ray.models.policy import load_policy


def is_adapter(weights: Weights) -> bool:
    """Whether these are the factors of an adapter (see `adapter_of`), not a whole model."""
    return all(any(f".{part}." in entry.name for part in FACTORS) for entry in weights.index)


def adapted_layers(adapter: Weights) -> tuple[str, ...]:
    """The names of the layers, in the policy, that the adapter's factors are beside."""
    return tuple(dict.fromkeys(layer_of(entry.name) for entry in adapter.index))


class Merger:
    """A model's own weights in memory, and what the learner's adapters make of them, by the learner's own arithmetic."""

    def __init__(self, model: str, dtype: torch.dtype, adapter: Weights) -> None:
        """Read the weights of `model`, a folder or hub id, for adapters of the rank, and at the layers, of this one.

        Raises ValueError for an adapter of other layers than the model has.
        """
        self._plain = load_policy(model, dtype)
        self._adapted = with_adapter(self._plain, adapter.index[0].shape[0], seed=0, targets=adapted_layers(adapter))
        self._factors = {name: weight.parameters[0] for name, weight in adapter_of(self._adapted)}

    @torch.no_grad()
    def merge(self, adapter: Weights) -> Weights:
        """The whole model of that version. Raises ValueError for factors that were damaged, or are not this model's."""
        verify(adapter)
        found = {name: tuple(tensor.shape) for name, tensor in unpack(adapter)}
        expected = {name: tuple(factor.shape) for name, factor in self._factors.items()}
        if found != expected:
            wrong = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
            raise ValueError(f"factor {wrong} must be {expected.get(wrong, 'absent')}, got {found.get(wrong, 'nothing')}")
        for name, tensor in unpack(adapter):
            self._factors[name].copy_(tensor)
        return pack(adapter.version, ((name, weight.value()) for name, weight in weights_of(self._plain, self._adapted)))
