"""From one reward per answer to one advantage per token: rewards [B, T], GAE, whitening by global moments.

Every mask is 0/1 with 1 on action tokens (the tokens the policy wrote); masked-out positions come back as 0.
"""

from __future__ import annotations

import torch

WHITEN_EPSILON = 1e-8  # variance below which advantages count as equal


def token_rewards(
    reward_B: torch.Tensor, truncated_B: torch.Tensor, mask_BT: torch.Tensor, penalty_BT: torch.Tensor, truncation_penalty: float
) -> torch.Tensor:
    """Reward of each token: the answer's reward on its last action token, less a penalty on every one.

        r_t = [t is the last action token] * (reward - truncation_penalty * truncated) - penalty_t

    The last action token is found by the mask, whether or not it is an end of sequence. `reward_B` [B] any real,
    `truncated_B` [B] 0/1, `penalty_BT` [B, T] any real (beta * k1 where the KL is in the reward, else zeros),
    `truncation_penalty` >= 0. Returns [B, T]. Raises ValueError if a row has no action token.
    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2.
    """
    if bool((mask_BT.sum(dim=1) == 0).any()):
        row = int((mask_BT.sum(dim=1) == 0).nonzero()[0])
        raise ValueError(f"every row of mask must hold an action token, got none in row {row}")
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (positions * (mask_BT != 0)).argmax(dim=1)
    rewards_BT = torch.where(mask_BT != 0, -penalty_BT, torch.zeros_like(penalty_BT))
    return rewards_BT.scatter_add(1, last_B[:, None], (reward_B - truncation_penalty * truncated_B)[:, None].to(rewards_BT.dtype))


def gae(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and the returns a critic regresses on.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    over the action tokens of each row, with V = 0 after the last (also of a truncated answer, whose penalty is in the
    reward). lam = 1 gives R_t = the discounted sum of rewards; lam = 0 the one-step error. Inputs [B, T]; `gamma` and
    `lam` in [0, 1]. Returns (advantages, returns), each [B, T] and 0 where the mask is.
    Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    advantages_BT = torch.zeros_like(values_BT)
    advantage_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        is_action_B = mask_BT[:, t] != 0
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(is_action_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(is_action_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = torch.where(is_action_B, advantage_B, 0.0)
    return advantages_BT, torch.where(mask_BT != 0, advantages_BT + values_BT, 0.0)


def moments(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """(sum, sum of squares, count) of the unmasked entries, float64 [3]. Moments of shards add up to those of the whole."""
    kept = values_BT[mask_BT != 0].double()
    return torch.stack(
        [kept.sum(), kept.square().sum(), torch.tensor(float(kept.numel()), dtype=torch.float64, device=kept.device)]
    )


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Values shifted and scaled to mean 0 and population variance 1 over everything that `total` counts.

        (x - mean) / sqrt(var + 1e-8),   mean = sum / count,   var = sum of squares / count - mean^2

    `total` [3] holds the `moments` added up over all shards, so the result does not depend on the split.
    Returns [B, T], 0 where the mask is. Raises ValueError unless the count is >= 1.
    """
    if not float(total[2]) >= 1:
        raise ValueError(f"total must count at least one entry, got {float(total[2])}")
    mean, variance = total[0] / total[2], (total[1] / total[2] - (total[0] / total[2]).square()).clamp(min=0.0)
    whitened_BT = (values_BT.double() - mean) / (variance + WHITEN_EPSILON).sqrt()
    return torch.where(mask_BT != 0, whitened_BT, 0.0).to(values_BT.dtype)
