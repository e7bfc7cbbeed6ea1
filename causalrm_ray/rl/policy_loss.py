"""The terms of policy-gradient losses, per token [B, T]; `masked_mean` reduces them last, by a global count."""

from __future__ import annotations

from typing import NamedTuple

import torch

KL_STEP = 0.2  # largest relative error that one adaptation of the KL coefficient corrects


def log_distribution(logits_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Float32 log-probabilities [B, T, V] of the distribution sampled at `temperature` > 0: log_softmax(logit / temperature)."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logits_BTV = logits_BTV.float() if temperature == 1 else logits_BTV.float() / temperature
    return torch.log_softmax(logits_BTV, dim=-1)


def token_logprobs(log_distribution_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Log-probability [B, T], nats, of each token id in `tokens_BT` under its distribution."""
    return log_distribution_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)


def entropy(log_distribution_BTV: torch.Tensor) -> torch.Tensor:
    """Entropy [B, T] of each distribution, nats, in [0, ln V]: -sum over v of p_v log p_v, 0 where p_v is. No gradient."""
    distribution_BTV = log_distribution_BTV.detach()
    return -distribution_BTV.exp().mul_(distribution_BTV).nansum(dim=-1)  # 0 times -inf is NaN; in place, for V can be large


class Clip(NamedTuple):
    """The interval [1 - low, 1 + high] that a ratio of probabilities is clipped to; `low` and `high` > 0."""

    low: float
    high: float

    def clamp(self, ratio_BT: torch.Tensor) -> torch.Tensor:
        """The nearest value inside."""
        return ratio_BT.clamp(1 - self.low, 1 + self.high)


def token_ratio(logprobs_BT: torch.Tensor, old_logprobs_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """exp(logprob - old_logprob) of each token, [B, T]; the mask is not needed."""
    return torch.exp(logprobs_BT - old_logprobs_BT)


def sequence_ratio(logprobs_BT: torch.Tensor, old_logprobs_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """exp(mean over an answer's tokens of logprob - old_logprob), the same on each of its tokens, [B, T].

    The length-normalised ratio of whole answers: (pi(y) / pi_old(y))^(1 / |y|). Zheng et al. 2025 (arXiv 2507.18071), eq. 7.
    """
    difference_BT = torch.where(mask_BT != 0, logprobs_BT - old_logprobs_BT, 0.0)
    mean_B1 = difference_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.exp(mean_B1).expand_as(logprobs_BT)


def ppo_clip(
    logprobs_BT: torch.Tensor, ratio_BT: torch.Tensor, advantages_BT: torch.Tensor, clip: Clip, dual_clip: float | None = None
) -> torch.Tensor:
    """Clipped surrogate loss of each token.

        -min(r A, clamp(r, 1 - low, 1 + high) A)

    Its gradient is 0 where the ratio r has left the interval in the direction that A asks for. That leaves the loss unbounded
    where A < 0 and r is large (a bad token that has become likely): there `dual_clip` c > 1 bounds it by -c A, and the
    gradient is 0 from r = c on. Inputs and result [B, T]; only `ratio_BT` carries a gradient;
    `logprobs_BT` is not used.
    Schulman et al. 2017 (arXiv 1707.06347), eq. 7; high > low ("clip higher"): Yu et al. 2025 (arXiv 2503.14476), eq. 10;
    dual clip: Ye et al. 2020 (arXiv 1912.09729), eq. 5.
    """
    gain_BT = torch.minimum(ratio_BT * advantages_BT, clip.clamp(ratio_BT) * advantages_BT)
    if dual_clip is None:
        return -gain_BT
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    return -torch.where(advantages_BT < 0, torch.maximum(gain_BT, dual_clip * advantages_BT), gain_BT)


def cispo(logprobs_BT: torch.Tensor, ratio_BT: torch.Tensor, advantages_BT: torch.Tensor, clip: Clip) -> torch.Tensor:
    """REINFORCE with a clipped importance weight, which carries no gradient.

        -stop_gradient(clamp(r, 1 - low, 1 + high)) A logprob

    Unlike `ppo_clip` no token's gradient is 0 for its ratio alone. [B, T]; only `logprobs_BT` carries a gradient.
    MiniMax 2025 (arXiv 2506.13585), eqs. 4 and 5.
    """
    return -clip.clamp(ratio_BT).detach() * advantages_BT * logprobs_BT


def value_loss(values_BT: torch.Tensor, old_values_BT: torch.Tensor, returns_BT: torch.Tensor, clip: float) -> torch.Tensor:
    """Clipped squared error of each token's value.

        1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)

    Inputs and result [B, T], in (squared) units of reward; `clip` > 0. Schulman et al. 2017, as in OpenAI baselines.
    """
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())


def kl_k1(logprobs_BT: torch.Tensor, reference_logprobs_BT: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) per token, nats: d = logprob - reference logprob. Unbiased under the policy; any sign."""
    return logprobs_BT - reference_logprobs_BT


def kl_k2(logprobs_BT: torch.Tensor, reference_logprobs_BT: torch.Tensor) -> torch.Tensor:
    """d^2 / 2 with d of `kl_k1`: biased as a value, >= 0; its gradient is that of the KL, in expectation under the policy."""
    return 0.5 * kl_k1(logprobs_BT, reference_logprobs_BT).square()


def kl_k3(logprobs_BT: torch.Tensor, reference_logprobs_BT: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d with d of `kl_k1`: unbiased under the policy, >= 0. Schulman 2020, "Approximating KL divergence"."""
    difference_BT = kl_k1(logprobs_BT, reference_logprobs_BT)
    return torch.expm1(-difference_BT) + difference_BT


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The KL coefficient after a step of `answers` answers whose mean KL was `kl`.

        coefficient * (1 + clamp(kl / target - 1, -0.2, 0.2) * answers / horizon)

    `kl` and `target` > 0 in nats per answer; `horizon` >= `answers` keeps the result positive. Ziegler et al. 2019
    (arXiv 1909.08593), section 2.2.
    """
    if not target > 0:
        raise ValueError(f"target must be above 0, got {target}")
    return coefficient * (1 + min(max(kl / target - 1, -KL_STEP), KL_STEP) * answers / horizon)


def importance_weight(old_logprobs_BT: torch.Tensor, rollout_logprobs_BT: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated weight of each token for having been sampled by an engine whose arithmetic differs from the learner's.

        min(exp(learner's logprob - engine's logprob), cap)

    Unbiased without truncation, which trades a bias for a bounded variance. [B, T] in (0, cap]; `cap` > 0; math.inf
    truncates nothing. Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL".
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    return torch.exp(old_logprobs_BT - rollout_logprobs_BT).clamp(max=cap)


def masked_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, count: float) -> torch.Tensor:
    """sum(values where the mask is 1) / count, a scalar.

    `count` >= 1 is the number of unmasked entries over all shards and accumulated micro-batches, not only over these
    rows: the shards' results add up to the mean over the whole. Masked entries may hold anything finite.
    """
    if not count >= 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return torch.where(mask_BT != 0, values_BT, 0.0).sum() / count
