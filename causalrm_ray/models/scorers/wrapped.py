"""Scorers of features around others: standardised first, or cautious where members disagree."""

from __future__ import annotations

from torch import Tensor, nn

from causalrm_ray.models.scorers.heads import Cautious, Ensemble, Levelled


class Standardised(nn.Module):
    """A scorer of features that are centred and scaled first: scorer((x - centre) / scale).

    `centre` [D]; `scale` is one number, so that directions keep their relative weight.
    """

    def __init__(self, scorer: nn.Module, centre: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.scorer = scorer
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logit [B] of `features` [B, D]."""
        return self.scorer(features=(features.float() - self.centre) / self.scale)


def cautious(scorer: nn.Module, caution: float) -> nn.Module:
    """A scorer that stays `caution` standard deviations of its members below their mean, at the level that it was given.

    Raises ValueError for one without members.
    """
    if isinstance(scorer, Levelled):
        return Levelled(cautious(scorer.scorer, caution), float(scorer.shift), float(scorer.slope))
    if not isinstance(scorer, Ensemble):
        raise ValueError(f"caution needs an ensemble, got {type(scorer).__name__}")
    return Cautious(scorer, caution)
