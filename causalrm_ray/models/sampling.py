"""What an engine samples from, and the draw itself: pure functions of logits and of one uniform number per token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from causalrm_ray.types import Sampling


def sampling_distribution(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Float32 log-probabilities [B, V] of the distribution that `sampling` draws from, -inf for a token that it cuts.

    The order is vLLM's: temperature, then min_p, then top_k (ties with the k-th are kept), then top_p of what is left. At
    temperature 0 nothing is cut: the plain log_softmax. The likeliest token is never cut.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return torch.log_softmax(logits_BV, dim=-1)
    scores_BV: Any = logits_BV / sampling.temperature
    no_ids: Any = None  # of the tokens before: these cuts do not look at them
    if sampling.min_p > 0:
        scores_BV = MinPLogitsWarper(sampling.min_p)(no_ids, scores_BV)
    if sampling.top_k > 0:
        scores_BV = TopKLogitsWarper(sampling.top_k)(no_ids, scores_BV)
    if sampling.top_p < 1:
        scores_BV = TopPLogitsWarper(sampling.top_p)(no_ids, scores_BV)
    return torch.log_softmax(scores_BV, dim=-1)


def draw(log_distribution_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Token ids [B]: the first whose cumulative probability exceeds `uniform_B` (float64, in [0, 1)).

    Each row depends on its own number only, and a token of probability 0 is never drawn.
    """
    mass_BV = log_distribution_BV.double().exp().cumsum(dim=-1)
    reached_B1 = uniform_B.unsqueeze(-1) * mass_BV[:, -1:]
    return torch.searchsorted(mass_BV, reached_B1, right=True).squeeze(-1).clamp(max=mass_BV.shape[-1] - 1)
