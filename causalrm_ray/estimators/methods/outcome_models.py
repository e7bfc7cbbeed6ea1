"""Models of an impression's outcome for ensembles of scorers: who gives feedback, what it says, and the noise in it.

LabelSelection       MISSING, DISLIKED, LIKED, selection depending on the opinion      (losses.selection)
FeedbackByFeatures   is feedback given?
NoisyLabel           what does it say, where it is given?
"""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.losses.selection import graded_outcomes
from causalrm_ray.models.scorers.heads import EnsembleScorer
from causalrm_ray.types import NoiseRates

CENTRE, STRENGTH = 0.15, 5.0  # prior of the noise rates: a Gaussian on logit(2 rho), worth a few rows
SPEED = 10.0  # how much faster the few scalars learn than the weights


class ScalarParameters(nn.Module):
    """A few numbers of each member that start at given values [K, ...] and learn SPEED times as fast as weights do."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.moved = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        """Their values, in the shape of `start`."""
        return cast(Tensor, self.start) + SPEED * self.moved


class LabelNoise(nn.Module):
    """rho_01 and rho_10 of each of K members: `known`, or in (0, 0.5) and learned under a prior."""

    def __init__(self, members: int, known: NoiseRates | None = None) -> None:
        super().__init__()
        self.known = known
        self.logits = ScalarParameters(torch.full((members, 2), logit(2 * CENTRE)))

    def forward(self) -> tuple[Tensor, ...]:
        """The rates (rho_01 [K], rho_10 [K])."""
        logits = self.logits()
        if self.known is not None:
            return tuple(torch.full_like(logits[:, 0], rate) for rate in astuple(self.known))
        return (torch.sigmoid(logits) / 2).unbind(1)

    def penalty(self) -> Tensor:
        """Minus the log-prior, up to a constant, in nats; the mean over members."""
        return _surprise(self.logits()).mean()

    def means(self) -> NoiseRates:
        """The rates, means over members."""
        return NoiseRates(*(float(rate.detach().mean()) for rate in self())) if self.known is None else self.known


class LabelSelection(nn.Module):
    """Outcomes where selection depends on the opinion: log-probabilities [B, K, 3] of K members (see losses.selection)."""

    def __init__(self, scorer: EnsembleScorer, start: Tensor, rates: NoiseRates | None = None) -> None:
        """`start` [K, S, 3] are each member's (a, c, d) of each stratum at first; `rates` of the noise, if they are known."""
        super().__init__()
        self.scorer = scorer
        self.selection = ScalarParameters(start)
        self.noise = LabelNoise(len(start), rates)

    def forward(self, stratum: Tensor, **batch: Tensor) -> Tensor:
        """Per row and member [B, K, 6]: the three log-probabilities, P(r*=1 | x), and P(o=1, r*=k | x), k = 1, 0.

        The rows of the batch lie in `stratum` [B].
        """
        f = self.scorer.members(**batch)
        a, c, d = self.selection()[:, stratum].permute(2, 1, 0)
        logprob, on1, on0 = graded_outcomes(f, a, c, d, *self.noise())
        return torch.cat([logprob, torch.stack([torch.sigmoid(f), on1, on0], dim=2)], dim=2)

    def penalty(self) -> Tensor:
        """Minus the log-prior of the scalars: that of the label noise, and a standard normal for each grade effect."""
        return self.noise.penalty() + self.selection()[:, :, 2].square().sum(1).mean()


class FeedbackByFeatures(nn.Module):
    """Logits [B, K] of P(o = 1 | x, stratum): an ensemble on x, and a level for each stratum that x may not show."""

    def __init__(self, scorer: EnsembleScorer, strata: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.level = ScalarParameters(torch.zeros(len(scorer.bias), strata))

    def forward(self, stratum: Tensor, **batch: Tensor) -> Tensor:
        """Logits [B, K] of a batch whose rows lie in `stratum` [B]."""
        return self.scorer.members(**batch) + self.level()[:, stratum].T

    def penalty(self) -> Tensor:
        """Minus the log-prior of the levels, a standard normal for each."""
        return self.level().square().sum(1).mean() / 2


class NoisyLabel(nn.Module):
    """The opinion e = P(r* = 1 | x), and P(r = 1 | x, o = 1) = rho_10 + (1 - rho_01 - rho_10) e, its noisy label."""

    def __init__(self, scorer: EnsembleScorer, rates: NoiseRates | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.noise = LabelNoise(len(scorer.bias), rates)

    def forward(self, **batch: Tensor) -> Tensor:
        """P(r = 1 | x, o = 1) and P(r* = 1 | x) of a batch."""
        rho_01, rho_10 = self.noise()
        opinion = torch.sigmoid(self.scorer.members(**batch))
        return torch.stack([rho_10 + (1 - rho_01 - rho_10) * opinion, opinion], dim=2)


def surprise(rates: NoiseRates) -> float:
    """Minus the log-prior of `rates` in (0, 0.5), in nats, up to a constant."""
    return float(_surprise(torch.logit(2 * torch.tensor(astuple(rates), dtype=torch.float64))))


def _surprise(logits: Tensor) -> Tensor:
    """That of logit(2 rho) [..., 2]."""
    return STRENGTH * (logits - logit(2 * CENTRE)).square().sum(-1)


def logit(probability: float) -> float:
    """log(p / (1 - p)) of a probability in (0, 1)."""
    return math.log(probability / (1 - probability))
