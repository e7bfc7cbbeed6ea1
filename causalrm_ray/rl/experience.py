"""What a rank trains on: from a step's rewards to the loss of each micro-batch, and figures about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from causalrm_ray.rl.advantage import token_rewards
from causalrm_ray.rl.algorithms import Algorithm, AllReduceSum, KLEstimator, Rows
from causalrm_ray.rl.policy_loss import Clip, importance_weight, kl_k1, kl_k2, kl_k3, masked_mean, value_loss

TRAINING = ("policy_loss", "value_loss", "entropy", "ratio_mean", "clip_fraction", "kl_step")  # means over trained tokens
IMPORTANCE_CAP = 2.0  # of the learner/engine importance weight of a token
LOSS_KL = {"k2": kl_k2, "k3": kl_k3}  # estimators whose gradient is that of the KL; k1's belongs in the reward


class Answers(NamedTuple):
    """One rank's answers as the policy saw them before the update: [B, R] over answer tokens, 0 where the mask is."""

    mask_BR: torch.Tensor
    logprobs_BR: torch.Tensor
    reference_logprobs_BR: torch.Tensor
    rollout_logprobs_BR: torch.Tensor
    values_BR: torch.Tensor  # 0 without a critic
    truncated_B: torch.Tensor
    places_B: torch.Tensor  # among the step's N


class Experience(NamedTuple):
    """What a rank trains on, [rows, R] over answer tokens, 0 where the mask is; without a critic, values and returns are 0."""

    mask_BR: torch.Tensor
    share_BR: torch.Tensor  # each token's weight in the reduction: 1, 1 / length of its answer, or 1 / a constant
    logprobs_BR: torch.Tensor
    reference_logprobs_BR: torch.Tensor
    weights_BR: torch.Tensor
    advantages_BR: torch.Tensor
    values_BR: torch.Tensor
    returns_BR: torch.Tensor

    def select(self, rows: Sequence[int], width: int) -> Experience:
        """These rows, up to `width` tokens."""
        return Experience(*(field[list(rows), :width] for field in self))

    def with_old_logprobs(self, logprobs_BR: torch.Tensor) -> Experience:
        """These rows with the policy's log-probabilities in place of the engine's, 0 where the mask is."""
        logprobs_BR = logprobs_BR * self.mask_BR
        weights_BR = importance_weight(logprobs_BR, self.logprobs_BR, IMPORTANCE_CAP)
        return self._replace(logprobs_BR=logprobs_BR, weights_BR=weights_BR)

    def with_padding_row(self) -> Experience:
        """One more row, all 0."""
        return Experience(*(torch.nn.functional.pad(field, (0, 0, 0, 1)) for field in self))


class Objective(NamedTuple):
    """What a learner optimises: an algorithm, and what the user chose for it.

    `clip` bounds the ratio, and by its `low` the value's step; `kl` is where and how the KL penalty enters; `lam` is GAE's
    lambda; `truncation` >= 0 is what an answer cut by the token limit pays, "mask" leaves it out of the loss; `max_new_tokens`
    is the longest answer, the divisor of the reduction "constant".
    """

    algorithm: Algorithm
    clip: Clip
    kl: KLEstimator
    lam: float
    truncation: float | Literal["mask"]
    max_new_tokens: int

    def fills_old_logprobs_in_step(self, optimizer_steps: int) -> bool:
        """Whether the old policy's log-probabilities are needed only in the one optimizer step of a policy step, whose forward
        pass computes them anyway: no advantage depends on them or on values, and no answer stays out of the step."""
        whole = optimizer_steps == 1 and self.truncation != "mask"
        return whole and not self.algorithm.critic and self.kl in LOSS_KL

    def minibatch_size(self, answers: int, tokens: int) -> int:
        """The normaliser of a minibatch of so many answers and tokens over all ranks."""
        return tokens if self.algorithm.reduction == "token_mean" else answers

    def shares(self, mask_BR: torch.Tensor) -> torch.Tensor:
        """Each token's weight [B, R] in the algorithm's reduction; their sum over the minibatch is then divided by its size."""
        if self.algorithm.reduction == "token_mean":
            return mask_BR
        return mask_BR / (self.max_new_tokens if self.algorithm.reduction == "constant" else mask_BR.sum(dim=1, keepdim=True))

    def loss(
        self,
        logprobs_BR: torch.Tensor,
        entropy_BR: torch.Tensor,
        values_BR: torch.Tensor,
        old: Experience,
        size: float,
        kl_coefficient: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(these rows' share of the minibatch's loss, [sums of TRAINING, tokens, largest ratio]).

            w_t * (algorithm's loss)_t + (value loss)_t + kl_coefficient * KL_t

        weighted by `share_BR` and divided by `size`, the minibatch's on all ranks (see `minibatch_size`); w is the importance
        weight of the engine's arithmetic. A KL by k1 is in the reward: as a loss, its expected gradient is 0.
        """
        mask_BR = old.mask_BR
        ratio_BR = self.algorithm.ratio(logprobs_BR, old.logprobs_BR, mask_BR)
        policy_BR = old.weights_BR * self.algorithm.loss(logprobs_BR, ratio_BR, old.advantages_BR, self.clip)
        loss_BR, value_BR = policy_BR, torch.zeros_like(policy_BR)
        if self.algorithm.critic:
            value_BR = value_loss(values_BR, old.values_BR, old.returns_BR, self.clip.low)
            loss_BR = loss_BR + value_BR
        if self.kl in LOSS_KL:
            loss_BR = loss_BR + kl_coefficient * LOSS_KL[self.kl](logprobs_BR, old.reference_logprobs_BR)
        with torch.no_grad():
            ratio_BR = ratio_BR * mask_BR
            clipped_BR = (self.clip.clamp(ratio_BR) != ratio_BR).float()
            kl_BR = kl_k3(old.logprobs_BR, logprobs_BR)  # of the policy that wrote the answers to the one it has become
            fields = (policy_BR, value_BR, entropy_BR, ratio_BR, clipped_BR, kl_BR, mask_BR)
            figures = torch.stack([*((field * mask_BR).double().sum() for field in fields), ratio_BR.max().double()])
        return masked_mean(loss_BR * old.share_BR, mask_BR, size), figures


def make_experience(
    answers: Answers,
    rewards_N: torch.Tensor,
    groups_N: torch.Tensor,
    objective: Objective,
    kl_coefficient: float,
    all_reduce_sum: AllReduceSum,
) -> Experience:
    """From the rewards [N] of a whole step to what this rank trains on; answers to one prompt share a number in `groups_N` [N].

    An answer that was cut by the token limit pays a penalty; or, masked, it keeps its reward, which others of its group are
    compared with, and stays out of the loss and of the whitening.
    """
    mask_BR, masks = answers.mask_BR, objective.truncation == "mask"
    in_reward = kl_coefficient if objective.kl == "k1" else 0.0
    rewards_BR = token_rewards(
        rewards_N[answers.places_B].to(mask_BR.dtype),
        answers.truncated_B,
        mask_BR,
        in_reward * kl_k1(answers.logprobs_BR, answers.reference_logprobs_BR),
        0.0 if objective.truncation == "mask" else objective.truncation,
    )
    trained_BR = mask_BR * (1 - answers.truncated_B)[:, None] if masks else mask_BR
    rows = Rows(rewards_BR, mask_BR, trained_BR, answers.values_BR, answers.places_B, groups_N)
    advantages_BR, returns_BR = objective.algorithm.advantages(rows, objective.lam, all_reduce_sum)
    return Experience(
        mask_BR=mask_BR,
        share_BR=objective.shares(mask_BR),
        logprobs_BR=answers.logprobs_BR,
        reference_logprobs_BR=answers.reference_logprobs_BR,
        weights_BR=importance_weight(answers.logprobs_BR, answers.rollout_logprobs_BR, IMPORTANCE_CAP),
        advantages_BR=advantages_BR,
        values_BR=answers.values_BR,
        returns_BR=returns_BR,
    )


def stack_rows(rows: Sequence[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Rows of up to `width` entries, float32 [rows, width], 0 behind their ends."""
    padded = torch.zeros(len(rows), width, device=device)
    for place, row in enumerate(rows):
        padded[place, : row.shape[0]] = row
    return padded
