"""Weights under the names, and in the shapes, that checkpoints have them: what other libraries' loaders expect.

transformers joins some as it loads (the experts of a layer into one tensor) and renames others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers.core_model_loading import revert_weight_conversion

from causalrm_ray.models.size import skeleton


def as_in_checkpoints(model: str, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model (folder or hub id), named as in transformers' module, as its checkpoint has them."""
    blank = skeleton(model)
    for name, tensor in named_tensors:  # one by one: all that is made of a weight of a module is made of it alone
        yield from revert_weight_conversion(blank, {name: tensor}).items()
