"""What an engine samples from, and the draw itself: pure functions of logits and of one uniform number per token."""

from __future__ import annotations

import math

import torch

from causalrm_ray.types import Sampling


def sampling_distribution(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Float32 log-probabilities [B, V] of the distribution that `sampling` draws from, -inf for a token that it cuts.

    The order is vLLM's: temperature, then min_p, then top_k (ties with the k-th are kept), then top_p of what is left. At
    temperature 0 nothing is cut: the plain log_softmax. The likeliest token is never cut.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return torch.log_softmax(logits_BV, dim=-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.min_p > 0:
        lowest_B1 = logits_BV.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        lowest_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1)
        cut_BV = torch.softmax(sorted_BV, dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        cut_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(cut_BV).scatter(-1, order_BV, cut_BV), -math.inf)
    return torch.log_softmax(logits_BV, dim=-1)


def draw(log_distribution_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Token ids [B]: the first whose cumulative probability exceeds `uniform_B` (float64, in [0, 1)).

    Each row depends on its own number only, and a token of probability 0 is never drawn.
    """
    mass_BV = log_distribution_BV.double().exp().cumsum(dim=-1)
    reached_B1 = uniform_B.unsqueeze(-1) * mass_BV[:, -1:]
    return torch.searchsorted(mass_BV, reached_B1, right=True).squeeze(-1).clamp(max=mass_BV.shape[-1] - 1)
