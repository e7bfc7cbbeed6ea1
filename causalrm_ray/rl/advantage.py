"""From one reward per answer to advantages: per token (GAE, reward to go, whitening by global moments) or per answer of a group.

Every mask is 0/1 with 1 on action tokens (the tokens the policy wrote); masked-out positions come back as 0. A group is all
answers to one prompt in a step: group statistics take the whole step [N], whichever ranks hold it.
"""

from __future__ import annotations

import torch

from causalrm_ray.checks import check_finite, check_same_length

WHITEN_EPSILON = 1e-8  # variance below which advantages count as equal
GROUP_EPSILON = 1e-4  # standard deviation of a group's rewards below which they count as equal


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


def reward_to_go(rewards_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards of this and all later action tokens, which REINFORCE++ whitens over the whole step.

        G_t = r_t + gamma G_{t+1},   A = whiten(G)

    With the KL in the reward and gamma = 1, G_t = reward - beta * (sum over i >= t of k1_i), as in the paper: Hu 2025
    (arXiv 2501.03262), REINFORCE++. It is GAE with lam = 1 and no critic. [B, T], 0 where the mask is; `gamma` in [0, 1].
    """
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)[0]


def centred(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """Reward of each answer less the mean of its group, A_i = R_i - mean: neither scaled nor whitened.

    `rewards_N` [N] any real; `groups_N` [N] int, 0 <= group. Returns [N] float64. Raises ValueError for a group of one.
    Liu et al. 2025 (arXiv 2503.20783), section 3 (Dr. GRPO).
    """
    return _centred(rewards_N, groups_N)[0]


def grpo(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """Reward of each answer against its group, in standard deviations of the group.

        A_i = (R_i - mean of the group) / (std of the group + 1e-4)

    with the population's std, so that a pair gets +1 and -1. A group of equal rewards gets 0: it does not show which answer is
    better. The scaling raises the weight of prompts of little spread, so the estimate is biased. Arguments, result and errors as
    in `centred`. Shao et al. 2024 (arXiv 2402.03300), section 4.1.2 (outcome supervision).
    """
    centred_N, count_G = _centred(rewards_N, groups_N)
    variance_G = torch.zeros_like(count_G).index_add_(0, groups_N, centred_N.square()) / count_G.clamp(min=1)
    return centred_N / (variance_G.sqrt() + GROUP_EPSILON)[groups_N]


def rloo(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """Reward of each answer less the mean reward of the other answers to its prompt.

        A_i = R_i - (sum over j != i of R_j) / (n - 1) = n / (n - 1) (R_i - mean of the group)

    Unbiased: the baseline does not depend on the answer that it is subtracted from. Arguments, result and errors as in
    `centred`. Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8; Kool et al. 2019.
    """
    centred_N, count_G = _centred(rewards_N, groups_N)
    return (count_G / (count_G - 1))[groups_N] * centred_N


def _centred(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards less their group's mean [N], answers in each group [G]), float64; a group that no answer is in counts 0."""
    check_same_length(rewards=rewards_N, groups=groups_N)
    check_finite("rewards", rewards_N)
    count_G = torch.bincount(groups_N).double()
    if bool((count_G == 1).any()):
        group = int((count_G == 1).nonzero()[0])
        raise ValueError(f"every group must hold at least 2 answers, got 1 in group {group}")
    mean_G = torch.zeros_like(count_G).index_add_(0, groups_N, rewards_N.double()) / count_G.clamp(min=1)
    return rewards_N.double() - mean_G[groups_N], count_G


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
