"""The policy-gradient algorithms: what each needs, and how it turns rewards into advantages.

A new one is a key here and a name in the configuration. All share the clipped surrogate loss (see `policy.ppo_clip`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from causalrm_ray.rl.advantage import gae, grpo, moments, reward_to_go, rloo, whiten

KLEstimator = Literal["k1", "k2", "k3"]
GAMMA = 1.0  # discount: an answer is judged as a whole
AllReduceSum = Callable[[torch.Tensor], torch.Tensor]  # the sum of a tensor over all ranks; the identity where there is only one


class Rows(NamedTuple):
    """What one rank holds of a step of N answers: rows [B, R] over answer tokens, their places among the N."""

    rewards_BR: torch.Tensor
    mask_BR: torch.Tensor
    trained_BR: torch.Tensor  # the mask, 0 on answers that are left out of the loss
    values_BR: torch.Tensor
    places_B: torch.Tensor
    groups_N: torch.Tensor  # of the whole step: answers to one prompt share a number


class Advantages(NamedTuple):
    """[B, R], 0 where the mask is; `returns_BR` is what the critic regresses on, 0 without one."""

    advantages_BR: torch.Tensor
    returns_BR: torch.Tensor


class Algorithm(NamedTuple):
    """`kl` is the estimator that its paper penalises by; `advantages` takes (rows, lam, all_reduce_sum).

    Its loss is a mean over tokens; `per_answer`, over answers of the mean over their tokens.
    """

    critic: bool
    kl: KLEstimator
    advantages: Callable[[Rows, float, AllReduceSum], Advantages]
    per_answer: bool = False
    grouped: bool = False  # compares an answer with the others to its prompt


def ppo_advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
    """GAE, whitened over all tokens of the step."""
    advantages_BR, returns_BR = gae(rows.rewards_BR, rows.values_BR, rows.mask_BR, GAMMA, lam)
    return Advantages(_whiten(advantages_BR, rows.trained_BR, all_reduce_sum), returns_BR)


def reinforce_pp_advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
    """Reward to go, whitened over all tokens of the step; `lam` is of no use."""
    to_go_BR = reward_to_go(rows.rewards_BR, rows.mask_BR, GAMMA)
    return Advantages(_whiten(to_go_BR, rows.trained_BR, all_reduce_sum), torch.zeros_like(to_go_BR))


def grpo_advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
    """One advantage per answer on each of its tokens; an answer has one reward, so `lam` is of no use."""
    return _per_answer(grpo, rows, all_reduce_sum)


def rloo_advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
    """As GRPO's, with the leave-one-out baseline."""
    return _per_answer(rloo, rows, all_reduce_sum)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(True, "k1", ppo_advantages),
    "grpo": Algorithm(False, "k3", grpo_advantages, per_answer=True, grouped=True),
    "rloo": Algorithm(False, "k1", rloo_advantages, grouped=True),
    "reinforce_pp": Algorithm(False, "k1", reinforce_pp_advantages),
}


def _whiten(values_BR: torch.Tensor, trained_BR: torch.Tensor, all_reduce_sum: AllReduceSum) -> torch.Tensor:
    total = all_reduce_sum(moments(values_BR, trained_BR))
    return whiten(values_BR, trained_BR, total) if float(total[2]) else torch.zeros_like(values_BR)


def _per_answer(
    estimate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: Rows, all_reduce_sum: AllReduceSum
) -> Advantages:
    """Advantages from the sum of each answer's token rewards; a group may be spread over ranks.

    Every rank fills in its own answers of the N and leaves 0 on the others, so adding up is exact and all ranks see one vector.
    """
    rewards_N = torch.zeros(len(rows.groups_N), dtype=torch.float64, device=rows.rewards_BR.device)
    rewards_N[rows.places_B] = rows.rewards_BR.double().sum(dim=1)
    advantages_N = estimate(all_reduce_sum(rewards_N), rows.groups_N)
    advantages_BR = advantages_N[rows.places_B, None].to(rows.rewards_BR.dtype) * rows.mask_BR
    return Advantages(advantages_BR, torch.zeros_like(advantages_BR))
