"""Scorers of frozen features as JSON and tensors: what a folder needs to rebuild one without pickle.

module -> describe -> JSON of types and sizes          JSON -> rebuild -> module -> load_state_dict
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from causalrm_ray.checkpoint import CheckpointError, read_json, write_json
from causalrm_ray.models.scorers.heads import (
    Cautious,
    Corrected,
    EnsembleScorer,
    FeatureScorer,
    Levelled,
    Mixture,
)
from causalrm_ray.models.scorers.trees import BoostedScorer
from causalrm_ray.models.scorers.wrapped import Standardised


def write_scorer(path: Path, scorer: nn.Module) -> None:
    """Write a scorer to `path`.json and `path`.safetensors. Raises ValueError for a module of another package."""
    write_json(path.with_suffix(".json"), describe(scorer))
    tensors = {name: value.contiguous() for name, value in scorer.state_dict().items()}
    save_file(tensors, path.with_suffix(".safetensors"))


def read_scorer(path: Path) -> nn.Module:
    """The scorer that `write_scorer` wrote, in evaluation mode and without gradients. Raises CheckpointError where there is
    none."""
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
            scorer = rebuild(read_json(path.with_suffix(".json")))
        scorer.load_state_dict(load_file(path.with_suffix(".safetensors")))
    except (KeyError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} must hold a scorer: {error}") from error
    return scorer.requires_grad_(False)


def describe(scorer: nn.Module) -> dict[str, Any]:
    """Types and sizes of a scorer and its parts, as JSON. Raises ValueError for a module of another package."""
    if isinstance(scorer, FeatureScorer):
        layers = [layer for layer in (*scorer.body, scorer.head) if isinstance(layer, nn.Linear)]
        return {
            "type": "FeatureScorer",
            "in_features": layers[0].in_features,
            "hidden": [layer.out_features for layer in layers[:-1]],
        }
    if isinstance(scorer, EnsembleScorer):
        members, hidden, width = scorer.inner.shape
        return {"type": "EnsembleScorer", "in_features": width, "members": members, "hidden": hidden}
    if isinstance(scorer, BoostedScorer):
        members, trees, nodes = scorer.value.shape
        return {
            "type": "BoostedScorer",
            "in_features": scorer.in_features,
            "members": members,
            "trees": trees,
            "nodes": nodes,
        }
    if isinstance(scorer, Mixture):
        return {"type": "Mixture", "scorers": [describe(part) for part in scorer.scorers]}
    if isinstance(scorer, Corrected):
        return {"type": "Corrected", "base": describe(scorer.base), "residual": describe(scorer.residual)}
    if isinstance(scorer, Levelled):
        return {"type": "Levelled", "scorer": describe(scorer.scorer)}
    if isinstance(scorer, Standardised):
        return {"type": "Standardised", "in_features": len(scorer.centre), "scorer": describe(scorer.scorer)}
    if isinstance(scorer, Cautious):
        return {"type": "Cautious", "caution": scorer.caution, "scorer": describe(scorer.scorer)}
    raise ValueError(f"a scorer of type {type(scorer).__name__} cannot be saved: only this package's can")


def rebuild(described: Mapping[str, Any]) -> nn.Module:
    """A scorer in evaluation mode, to be filled by load_state_dict, from what `describe` gave. ValueError for an unknown type."""
    match described["type"]:
        case "FeatureScorer":
            scorer: nn.Module = FeatureScorer(described["in_features"], described["hidden"])
        case "EnsembleScorer":
            scorer = EnsembleScorer(torch.zeros(1, described["in_features"]), described["members"], described["hidden"])
        case "BoostedScorer":
            sizes = (described[name] for name in ("in_features", "members", "trees", "nodes"))
            scorer = BoostedScorer(*sizes)
        case "Mixture":
            scorers = [rebuild(part) for part in described["scorers"]]
            scorer = Mixture(scorers, [0.0] * len(scorers))
        case "Corrected":
            scorer = Corrected(rebuild(described["base"]), cast(EnsembleScorer, rebuild(described["residual"])))
        case "Levelled":
            scorer = Levelled(rebuild(described["scorer"]))
        case "Standardised":
            scorer = Standardised(rebuild(described["scorer"]), torch.zeros(described["in_features"]), torch.ones(()))
        case "Cautious":
            scorer = Cautious(rebuild(described["scorer"]), described["caution"])
        case unknown:
            known = "FeatureScorer, EnsembleScorer, BoostedScorer, Mixture, Corrected, Levelled, Standardised or Cautious"
            raise ValueError(f"type of a scorer must be {known}, got {unknown!r}")
    return scorer.eval()
