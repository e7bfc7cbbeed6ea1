"""Scorers of frozen features as JSON and tensors: what a folder needs to rebuild one without pickle.

module -> describe -> JSON of types and sizes          JSON -> rebuild -> module -> load_state_dict
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from causalrm_ray.models.scorers.heads import Corrected, EnsembleScorer, FeatureScorer, Levelled, Mixture
from causalrm_ray.models.scorers.trees import BoostedScorer


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
        case unknown:
            known = "FeatureScorer, EnsembleScorer, BoostedScorer, Mixture, Corrected or Levelled"
            raise ValueError(f"type of a scorer must be {known}, got {unknown!r}")
    return scorer.eval()
