"""Heads on frozen features: a feature vector in, one logit out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MLPHead(nn.Module):
    """Leaky-ReLU multi-layer perceptron with one logit; no hidden layer makes it linear.

    `hidden` are the layers' widths, (256, 64) as the authors of arXiv 2603.18736 have it; `dropout` in [0, 1) follows each.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (256, 64), dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_features
        for out in hidden:
            layers += [nn.Linear(width, out), nn.LeakyReLU(), nn.Dropout(dropout)]
            width = out
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logit [B] of `features` [B, D]."""
        return self.layers(features).squeeze(-1)
