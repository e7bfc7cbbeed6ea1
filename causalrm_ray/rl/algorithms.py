"""The policy-gradient algorithms: how each turns rewards into advantages, and its loss.

    rewards --advantages--> A      (logprobs, old logprobs) --ratio--> r      (r, A) --loss--> per token --reduction--> a scalar

A new one is an `Algorithm`: a row of ALGORITHMS, or an object of another package (see causalrm_ray.registry). The value loss
and the KL penalty are the learner's, the same for all (see `experience.Objective`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch

from causalrm_ray.rl.advantage import centred, gae, grpo, moments, reward_to_go, rloo, whiten
from causalrm_ray.rl.policy_loss import Clip, cispo, ppo_clip, sequence_ratio, token_ratio

KLEstimator = Literal["k1", "k2", "k3"]
Reduction = Literal["token_mean", "answer_mean", "constant"]
GAMMA = 1.0  # discount: an answer is judged as a whole
DUAL_CLIP = 3.0  # times the advantage: the most that one bad token that has become likely adds to the loss
AllReduceSum = Callable[[torch.Tensor], torch.Tensor]  # the sum of a tensor over all ranks; the identity where there is only one


class Rows(NamedTuple):
    """One rank's part of a step of N answers: rows [B, R] over answer tokens, their places among the N."""

    rewards_BR: torch.Tensor
    mask_BR: torch.Tensor
    trained_BR: torch.Tensor  # the mask, 0 on answers that are left out of the loss
    values_BR: torch.Tensor
    places_B: torch.Tensor
    groups_N: torch.Tensor  # of the whole step: answers to one prompt share a number


class Advantages(NamedTuple):
    """[B, R], 0 where the mask is; `returns_BR` are the critic's targets, 0 without one."""

    advantages_BR: torch.Tensor
    returns_BR: torch.Tensor


ppo_loss = partial(ppo_clip, dual_clip=DUAL_CLIP)


class Algorithm(NamedTuple):
    """One algorithm; its functions take and return tensors [B, R] over the tokens of one rank's answers.

    advantages  (rows, GAE lambda, all_reduce_sum) -> Advantages
    kl          the estimator that its paper penalises by
    loss        (logprobs, ratio, advantages, clip) -> loss of each token; logprobs and ratio carry the gradient
    ratio       (logprobs, old logprobs, mask) -> ratio of new to old probabilities that `loss` clips
    reduction   token_mean: mean over all tokens of the minibatch; answer_mean: mean over answers of the mean over their tokens;
                constant: sum over tokens / the most tokens of an answer, mean over answers. All counts are global.
    clip        its paper's interval, used unless learner.clip or learner.clip_high is given
    critic      whether a value model is trained beside it
    grouped     whether it compares an answer with the others to its prompt
    """

    advantages: Callable[[Rows, float, AllReduceSum], Advantages]
    kl: KLEstimator
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Clip], torch.Tensor] = ppo_loss
    ratio: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = token_ratio
    reduction: Reduction = "token_mean"
    clip: Clip = Clip(0.2, 0.2)
    critic: bool = False
    grouped: bool = False


def ppo_advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
    """GAE, whitened over all tokens of the step."""
    advantages_BR, returns_BR = gae(rows.rewards_BR, rows.values_BR, rows.mask_BR, GAMMA, lam)
    return Advantages(_whiten(advantages_BR, rows.trained_BR, all_reduce_sum), returns_BR)


def reinforce_pp_advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
    """Reward to go, whitened over all tokens of the step; `lam` is not used."""
    to_go_BR = reward_to_go(rows.rewards_BR, rows.mask_BR, GAMMA)
    return Advantages(_whiten(to_go_BR, rows.trained_BR, all_reduce_sum), torch.zeros_like(to_go_BR))


def per_answer(
    estimate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[Rows, float, AllReduceSum], Advantages]:
    """Advantages by `estimate` of (rewards [N], groups [N]) -> [N], one per answer on each of its tokens; lambda is not used.

    A group may be spread over ranks: each writes its own answers' rewards among the N and leaves 0 elsewhere, so the sum over
    ranks is exact and all see one vector.
    """

    def advantages(rows: Rows, lam: float, all_reduce_sum: AllReduceSum) -> Advantages:
        rewards_N = torch.zeros(len(rows.groups_N), dtype=torch.float64, device=rows.rewards_BR.device)
        rewards_N[rows.places_B] = rows.rewards_BR.double().sum(dim=1)
        advantages_N = estimate(all_reduce_sum(rewards_N), rows.groups_N)
        advantages_BR = advantages_N[rows.places_B, None].to(rows.rewards_BR.dtype) * rows.mask_BR
        return Advantages(advantages_BR, torch.zeros_like(advantages_BR))

    return advantages


GRPO = Algorithm(per_answer(grpo), "k3", reduction="answer_mean", grouped=True)  # Shao et al. 2024 (arXiv 2402.03300)
ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(ppo_advantages, "k1", critic=True),
    "grpo": GRPO,
    "rloo": Algorithm(per_answer(rloo), "k1", grouped=True),
    "reinforce_pp": Algorithm(reinforce_pp_advantages, "k1"),
    # The papers of the last three have no KL penalty: theirs is learner.kl.coefficient=0.
    # Zheng et al. 2025 (arXiv 2507.18071): the ratio of whole answers, eq. 5 without a second bound, the clip of section 5.1.
    "gspo": GRPO._replace(loss=ppo_clip, ratio=sequence_ratio, clip=Clip(3e-4, 4e-4)),
    # Yu et al. 2025 (arXiv 2503.14476): the loss only; dynamic sampling of prompts and overlong reward shaping are no part of it.
    "dapo": GRPO._replace(reduction="token_mean", clip=Clip(0.2, 0.28)),
    # Liu et al. 2025 (arXiv 2503.20783): GRPO without division by the group's deviation or the answer's length.
    "dr_grpo": GRPO._replace(advantages=per_answer(centred), reduction="constant"),
    # MiniMax 2025 (arXiv 2506.13585): no lower bound; the upper one, a ratio of 5, is our choice.
    "cispo": GRPO._replace(loss=cispo, reduction="token_mean", clip=Clip(1.0, 4.0)),
}


def _whiten(values_BR: torch.Tensor, trained_BR: torch.Tensor, all_reduce_sum: AllReduceSum) -> torch.Tensor:
    total = all_reduce_sum(moments(values_BR, trained_BR))
    return whiten(values_BR, trained_BR, total) if float(total[2]) else torch.zeros_like(values_BR)
