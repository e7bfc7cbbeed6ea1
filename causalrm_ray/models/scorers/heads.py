"""Scorers of frozen features, and further heads on any scorer.

A scorer gives a logit [B] in two parts: states [B, D] of a batch, and a linear head on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from causalrm_ray.models.kernels import Dropout, dropout

BLOCK = 8_192  # rows in double precision at a time


class Scorer(Protocol):
    """What a module must have to be given further heads."""

    head: nn.Linear

    def states(self, **batch: Tensor) -> Tensor:
        """States [B, D] of a batch."""
        ...


class Opinions(NamedTuple):
    """Logits of K members and their weights, which sum to 1."""

    logits_BK: Tensor
    weights_K: Tensor


class Ensemble(nn.Module):
    """A scorer of several members: the mean of their probabilities."""

    opinions: Callable[..., Opinions]  # each member's logits of a batch

    def forward(self, *args: Tensor, **batch: Tensor) -> Tensor:
        """Logit [B] of the weighted mean of the members' probabilities."""
        logits_BK, weights_K = self.opinions(*args, **batch)
        return to_logit((torch.sigmoid(logits_BK) * weights_K).sum(1))


class FeatureScorer(nn.Module):
    """Leaky-ReLU multi-layer perceptron with one logit; no hidden layer makes it linear.

    `hidden` are the layers' widths, (256, 64) as the authors of arXiv 2603.18736 have it; `dropout` in [0, 1) follows each.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (256, 64), dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_features
        for out in hidden:
            layers += [nn.Linear(width, out), nn.LeakyReLU(), Dropout(dropout)]
            width = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)

    @property
    def is_linear(self) -> bool:
        """Whether it has no hidden layer."""
        return len(self.body) == 0

    def states(self, features: Tensor) -> Tensor:
        """The last hidden layer [B, H] of `features` [B, D]."""
        return self.body(features)

    def forward(self, features: Tensor) -> Tensor:
        """Logit [B] of `features` [B, D]."""
        return self.head(self.states(features)).squeeze(-1)


def as_scorer(scorer: nn.Module) -> Scorer:
    """A module known to be a scorer. Raises ValueError for one without states and head."""
    if not (hasattr(scorer, "states") and isinstance(getattr(scorer, "head", None), nn.Linear)):
        raise ValueError(f"a scorer must have states and a linear head, got {type(scorer).__name__}")
    return cast(Scorer, scorer)


class WithHeads(nn.Module):
    """A scorer with `extra` more linear heads on its states: outputs [B, 1 + extra], the scorer's logit first.

    The further heads start at zero. Raises ValueError for a scorer without states and head.
    """

    def __init__(self, scorer: nn.Module, extra: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.heads = nn.Linear(as_scorer(scorer).head.in_features, extra)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    @property
    def is_linear(self) -> bool:
        """Whether the scorer has no hidden layer."""
        return isinstance(self.scorer, FeatureScorer) and self.scorer.is_linear

    def forward(self, **batch: Tensor) -> Tensor:
        """Outputs [B, 1 + extra] of a batch as the scorer reads it."""
        scorer = cast(Scorer, self.scorer)
        states = scorer.states(**batch)
        return torch.cat([scorer.head(states), self.heads(states)], dim=1).float()


def centre_and_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] of `features` [N, D], and the one number that scales all directions, so that these keep their relative weight."""
    if len(features) <= BLOCK:
        mean = features.float().mean(0)
        return mean, (features.float() - mean).square().mean().sqrt().clamp_min(1e-6)
    blocks = features.split(BLOCK)  # no second copy of many rows
    mean = (torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(features)).float()
    squares = sum(float((block.float() - mean).square().sum(dtype=torch.float64)) for block in blocks)
    return mean, torch.tensor(squares / features.numel()).sqrt().clamp_min(1e-6)


class EnsembleScorer(Ensemble):
    """K small heads on frozen features, trained at once: a linear map plus one hidden layer each; their mean is the score.

        f_k(x) = b_k + w_k . x + v_k . leaky_relu(W_k x + u_k)

    w and v start at 0, so that a fit moves away from the base rate only as far as the data say. `x` is standardised by the mean
    [D] and the one scale of `features` [N, D], so that leading principal components stay the larger ones. The first axis of every
    parameter is the member's, so that members can be kept and stopped one by one.
    """

    def __init__(self, features: Tensor, members: int = 5, hidden: int = 32, dropout: float = 0.45) -> None:
        super().__init__()
        mean, scale = centre_and_scale(features)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        width = features.shape[1]
        self.dropout = dropout
        self.linear = nn.Parameter(torch.zeros(members, width))
        self.inner = nn.Parameter(torch.randn(members, hidden, width) / width**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(members, hidden))
        self.outer = nn.Parameter(torch.zeros(members, hidden))
        self.bias = nn.Parameter(torch.zeros(members))

    def start_at(self, logit: float | Tensor) -> None:
        """Let every member begin with this logit, or each with its own [K], for all rows."""
        with torch.no_grad():
            self.bias.copy_(torch.as_tensor(logit))

    def without_hidden(self) -> EnsembleScorer:
        """A copy whose members have no hidden layer and no dropout: f_k(x) = b_k + w_k . x."""
        found = copy.deepcopy(self)
        found.dropout = 0.0
        found.inner, found.inner_bias, found.outer = (
            nn.Parameter(layer.detach()[:, :0]) for layer in (self.inner, self.inner_bias, self.outer)
        )
        return found

    def take_linear(self, scorer: EnsembleScorer) -> None:
        """Take the weights w_k and b_k of another of as many members and features."""
        with torch.no_grad():
            self.linear.copy_(scorer.linear)
            self.bias.copy_(scorer.bias)

    def add(self, features: Tensor, logit: Tensor) -> None:
        """Add to every member the linear function of x that is nearest to `logit` [M] on `features` [M, D], by least squares."""
        width, mean, scale = features.shape[1], self.mean.cpu(), self.scale.cpu()
        products, sums = torch.zeros(width + 1, width + 1, dtype=torch.float64), torch.zeros(width + 1, dtype=torch.float64)
        for rows in torch.arange(len(features)).split(BLOCK):
            x = ((features[rows].float() - mean) / scale).double()
            design = torch.cat([x, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
            products += design.T @ design
            sums += design.T @ logit[rows].double()
        products.diagonal()[:-1].add_(1.0)  # a ridge worth a row, where features are many
        found = torch.linalg.solve(products, sums).to(self.linear)  # where a fit left the members
        with torch.no_grad():
            self.linear.add_(found[:-1])
            self.bias.add_(found[-1])

    def members(self, features: Tensor) -> Tensor:
        """Logits [B, K] of `features` [B, D], one of each member."""
        x = dropout((features.float() - self.mean) / self.scale, 0.4 * self.dropout, self.training)
        inner = nn.functional.linear(x, self.inner.flatten(0, 1), self.inner_bias.flatten()).unflatten(1, self.outer.shape)
        hidden = dropout(nn.functional.leaky_relu(inner), self.dropout, self.training)
        return self.bias + x @ self.linear.T + (hidden * self.outer).sum(-1)

    def opinions(self, features: Tensor) -> Opinions:
        """Each member's logits, with equal weights."""
        return Opinions(self.members(features), torch.full_like(self.bias, 1 / len(self.bias)))


class Mixture(Ensemble):
    """Scorers whose probabilities are averaged with fixed `weights` [K] that sum to 1."""

    def __init__(self, scorers: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.scorers = nn.ModuleList(scorers)
        self.register_buffer("weights", torch.tensor(weights))

    def opinions(self, **batch: Tensor) -> Opinions:
        """The logits of all scorers' members, each with its part of its scorer's weight."""
        parts = [cast(Ensemble, scorer).opinions(**batch) for scorer in self.scorers]
        weights = [part.weights_K * weight for part, weight in zip(parts, self.weights, strict=True)]
        return Opinions(torch.cat([part.logits_BK for part in parts], dim=1), torch.cat(weights))


class Corrected(Ensemble):
    """A `base` scorer, which stays as it is, plus the logits that an ensemble `residual` adds; its members' mean probability."""

    def __init__(self, base: nn.Module, residual: EnsembleScorer) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.residual = residual

    def opinions(self, **batch: Tensor) -> Opinions:
        """The base plus what each member adds."""
        added = self.residual.opinions(**batch)
        return Opinions(self.base(**batch).unsqueeze(1) + added.logits_BK, added.weights_K)


class Levelled(nn.Module):
    """A scorer of which the logit is scaled and shifted: shift + slope * logit.

    Around a whole ensemble: its logit is that of a mean of probabilities, so to shift its members would not be the same.
    """

    def __init__(self, scorer: nn.Module, shift: float = 0.0, slope: float = 1.0) -> None:
        super().__init__()
        self.scorer = scorer
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("slope", torch.tensor(slope))

    def forward(self, **batch: Tensor) -> Tensor:
        """Logit [B] of a batch as the scorer reads it."""
        return self.shift + self.slope * self.scorer(**batch)


def fold_level(head: nn.Linear, shift: float, slope: float) -> bool:
    """Let a linear `head` give shift + slope * its logit, in place; without a bias it is only scaled. Whether it has one."""
    with torch.no_grad():
        head.weight *= slope
        if head.bias is None:
            return False
        head.bias.mul_(slope).add_(shift)
    return True


class Cautious(nn.Module):
    """An ensemble scored lower where its members disagree."""

    def __init__(self, scorer: nn.Module, caution: float) -> None:
        super().__init__()
        self.scorer = scorer
        self.caution = caution

    def forward(self, **batch: Tensor) -> Tensor:
        """Logit [B] of a lower bound of the probability (see `lower_logit`)."""
        return lower_logit(*cast(Ensemble, self.scorer).opinions(**batch), self.caution)


def lower_logit(logits_BK: Tensor, weights_K: Tensor, caution: float) -> Tensor:
    """Logit [B] of the weighted mean of K probabilities less `caution` >= 0 of their standard deviations.

        mean_k p_k - caution sqrt(mean_k (p_k - mean p)^2)

    A policy that is rewarded by a mean seeks where its members err upwards; they seldom all do. Coste et al. 2024 (arXiv
    2310.02743), their uncertainty-weighted objective, with the standard deviation for the variance.
    """
    probability_BK = torch.sigmoid(logits_BK)
    mean_B1 = (probability_BK * weights_K).sum(1, keepdim=True)
    variance_B = ((probability_BK - mean_B1).square() * weights_K).sum(1)
    return to_logit(mean_B1.squeeze(1) - caution * variance_B.sqrt())


def to_logit(probability: Tensor) -> Tensor:
    """Logit [B] of a `probability` [B], which is kept 1e-5 from the ends."""
    return torch.logit(probability.clamp(1e-5, 1 - 1e-5))
