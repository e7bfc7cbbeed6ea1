"""Boosted trees as scorers: read from scikit-learn's, kept and evaluated as tensors, so that a folder of them needs no pickle.

X [N, D] -> each tree's leaf -> sum of their values, logit P(r = 1 | x, o = 1) -> back through the noise -> logit P(r* = 1 | x)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from causalrm_ray.models.scorers.heads import Ensemble, Opinions, to_logit
from causalrm_ray.types import NoiseRates

FIELDS = ("feature_idx", "num_threshold", "left", "right", "value", "is_leaf")  # of a node of HistGradientBoostingClassifier


class BoostedScorer(Ensemble):
    """K members, each a sum of trees: logits of P(r = 1 | x, o = 1) = rho_10 + (1 - rho_01 - rho_10) P(r* = 1 | x).

    A node with `feature` [K, T, M] = j sends x to `left` where x_j <= `threshold`, else to `right`; a leaf sends it to itself.
    Each member's logit is its `start` [K] plus its trees' `value` [K, T, M] at x's leaves; `rates` [2] are (rho_01, rho_10), and
    `bias` [K] is added to the logit of the opinion. Trees that a member lacks, and nodes that a tree lacks, are leaves of 0.
    """

    feature: Tensor
    threshold: Tensor
    left: Tensor
    right: Tensor
    value: Tensor
    start: Tensor
    rates: Tensor
    bias: Tensor

    def __init__(self, in_features: int, members: int, trees: int, nodes: int) -> None:
        super().__init__()
        self.in_features = in_features
        shape = (members, trees, nodes)
        for name in ("feature", "left", "right"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.long))
        for name in ("threshold", "value"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("start", torch.zeros(members, dtype=torch.float64))
        self.register_buffer("rates", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(members))

    def feedback(self, features: Tensor) -> Tensor:
        """P(r = 1 | x, o = 1) [B, K] of `features` [B, D], by each member."""
        members, trees, nodes = self.value.shape
        flat = [part.flatten() for part in (self.feature, self.threshold, self.left, self.right, self.value)]
        feature, threshold, left, right, value = flat
        x = features.double()
        first = torch.arange(members * trees, device=x.device) * nodes
        at = first.expand(len(x), -1)
        for _ in range(nodes):  # no tree is deeper than it has nodes, whatever a folder says
            below = x.gather(1, feature[at]) <= threshold[at]
            before, at = at, first + torch.where(below, left[at], right[at])
            if torch.equal(before, at):
                break
        return torch.sigmoid(self.start + value[at].view(len(x), members, trees).sum(2))

    def add(self, features: Tensor, logit: Tensor) -> None:
        """Add to every member the mean of `logit` [M], as trees have no linear part; of the rows `features` [M, D]."""
        self.bias.add_(logit.mean())

    def opinions(self, features: Tensor) -> Opinions:
        """Each member's logits, with equal weights."""
        rho_01, rho_10 = self.rates
        opinion = (self.feedback(features) - rho_10) / (1 - rho_01 - rho_10)
        return Opinions(self.bias + to_logit(opinion).float(), torch.full_like(self.bias, 1 / len(self.bias)))


def from_boosting(models: Sequence[Any], rates: NoiseRates) -> BoostedScorer:
    """The scorer of fitted HistGradientBoostingClassifier of two classes without categories, one for each member."""
    nodes = [[predictors[0].nodes for predictors in model._predictors] for model in models]
    trees, largest = max(len(member) for member in nodes), max((len(tree) for member in nodes for tree in member), default=1)
    scorer = BoostedScorer(models[0].n_features_in_, len(models), max(trees, 1), largest)
    itself = torch.arange(largest).expand_as(scorer.left)
    scorer.left.copy_(itself)
    scorer.right.copy_(itself)
    for k, member in enumerate(nodes):
        scorer.start[k] = float(models[k]._baseline_prediction.reshape(-1)[0])
        for t, tree in enumerate(member):
            feature, threshold, left, right, value, leaf = (torch.from_numpy(tree[name].copy()) for name in FIELDS)
            own, is_leaf = torch.arange(len(tree)), leaf.bool()
            places = scorer.feature[k, t], scorer.threshold[k, t], scorer.left[k, t], scorer.right[k, t], scorer.value[k, t]
            inner = torch.where(is_leaf, 0, feature.long()), torch.where(is_leaf, 0.0, threshold.double())
            further = torch.where(is_leaf, own, left.long()), torch.where(is_leaf, own, right.long())
            for place, found in zip(places, (*inner, *further, torch.where(is_leaf, value.double(), 0.0)), strict=True):
                place[: len(tree)] = found
    scorer.rates.copy_(torch.tensor([rates.rho_01, rates.rho_10]))
    return cast(BoostedScorer, scorer.eval())
