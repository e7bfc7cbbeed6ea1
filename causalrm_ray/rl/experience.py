"""What a rank makes of a step's answers: the rows that it trains on, the loss, and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.registry import ALGORITHMS
from causalrm_ray.rl.advantage import token_rewards
from causalrm_ray.rl.algorithms import AllReduceSum, KLEstimator, Rows
from causalrm_ray.rl.policy import importance_weight, kl_k1, kl_k2, kl_k3, masked_mean, ppo_clip, value_loss
from causalrm_ray.types import Completion, Scored, Span

TRAINING = ("policy_loss", "value_loss", "entropy", "ratio_mean", "clip_fraction", "kl_step")  # means over trained tokens
DUAL_CLIP = 3.0  # times the advantage: the most that one bad token that has become likely adds to the loss
IMPORTANCE_CAP = 2.0  # of the learner/engine importance weight of a token
LOSS_KL = {"k2": kl_k2, "k3": kl_k3}  # estimators whose gradient steers; k1's belongs in the reward


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
    share_BR: torch.Tensor  # each token's weight in the mean: 1, or 1 / length of its answer
    logprobs_BR: torch.Tensor
    reference_logprobs_BR: torch.Tensor
    weights_BR: torch.Tensor
    advantages_BR: torch.Tensor
    values_BR: torch.Tensor
    returns_BR: torch.Tensor

    def select(self, rows: Sequence[int], width: int) -> Experience:
        """These rows, up to `width` tokens."""
        return Experience(*(field[list(rows), :width] for field in self))

    def now_seen(self, logprobs_BR: torch.Tensor) -> Experience:
        """These rows with the policy's log-probabilities for the engine's, which stood in their place, 0 where the mask is."""
        logprobs_BR = logprobs_BR * self.mask_BR
        weights_BR = importance_weight(logprobs_BR, self.logprobs_BR, IMPORTANCE_CAP)
        return self._replace(logprobs_BR=logprobs_BR, weights_BR=weights_BR)

    def with_blank(self) -> Experience:
        """One more row, all 0."""
        return Experience(*(torch.nn.functional.pad(field, (0, 0, 0, 1)) for field in self))


class Objective(NamedTuple):
    """The terms of the loss: the clip (see `ppo_clip`), whether a critic learns, and the KL penalty with its coefficient."""

    clip: float
    critic: bool
    kl: KLEstimator
    kl_coefficient: float

    def loss(
        self, logprobs_BR: torch.Tensor, entropy_BR: torch.Tensor, values_BR: torch.Tensor, old: Experience, count: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(these rows' share of the minibatch's loss, [sums of TRAINING, tokens, largest ratio]).

        `count` is the sum of `share_BR` over the whole minibatch, on all ranks: its tokens, or its answers. A KL by k1 is in
        the reward: as a loss, its expected gradient is 0.
        """
        mask_BR = old.mask_BR
        policy_BR = old.weights_BR * ppo_clip(logprobs_BR, old.logprobs_BR, old.advantages_BR, self.clip, DUAL_CLIP)
        loss_BR, value_BR = policy_BR, torch.zeros_like(policy_BR)
        if self.critic:
            value_BR = value_loss(values_BR, old.values_BR, old.returns_BR, self.clip)
            loss_BR = loss_BR + value_BR
        if self.kl in LOSS_KL:
            loss_BR = loss_BR + self.kl_coefficient * LOSS_KL[self.kl](logprobs_BR, old.reference_logprobs_BR)
        with torch.no_grad():
            ratio_BR = torch.exp(logprobs_BR - old.logprobs_BR) * mask_BR
            clipped_BR = ((ratio_BR - 1).abs() > self.clip).float()
            kl_BR = kl_k3(old.logprobs_BR, logprobs_BR)  # of the policy that wrote the answers to the one it has become
            fields = (policy_BR, value_BR, entropy_BR, ratio_BR, clipped_BR, kl_BR, mask_BR)
            figures = torch.stack([*((field * mask_BR).double().sum() for field in fields), ratio_BR.max().double()])
        return masked_mean(loss_BR * old.share_BR, mask_BR, count), figures


def make_experience(
    answers: Answers,
    rewards_N: torch.Tensor,
    groups_N: torch.Tensor,
    config: LearnerConfig,
    kl_coefficient: float,
    all_reduce_sum: AllReduceSum,
) -> Experience:
    """From the rewards [N] of a whole step to what this rank trains on; `groups_N` as of `groups_of`.

    An answer that was cut by the token limit pays a penalty; or, masked, it keeps its reward, which others of its group are
    compared with, and stays out of the loss and of the whitening.
    """
    mask_BR, masks = answers.mask_BR, config.truncation == "mask"
    in_reward = kl_coefficient if kl_estimator(config) == "k1" else 0.0
    rewards_BR = token_rewards(
        rewards_N[answers.places_B].to(mask_BR.dtype),
        answers.truncated_B,
        mask_BR,
        in_reward * kl_k1(answers.logprobs_BR, answers.reference_logprobs_BR),
        0.0 if config.truncation == "mask" else config.truncation,
    )
    trained_BR = mask_BR * (1 - answers.truncated_B)[:, None] if masks else mask_BR
    rows = Rows(rewards_BR, mask_BR, trained_BR, answers.values_BR, answers.places_B, groups_N)
    advantages_BR, returns_BR = ALGORITHMS.load(config.algorithm).advantages(rows, config.lam, all_reduce_sum)
    return Experience(
        mask_BR=mask_BR,
        share_BR=mask_BR / mask_BR.sum(dim=1, keepdim=True) if ALGORITHMS.load(config.algorithm).per_answer else mask_BR,
        logprobs_BR=answers.logprobs_BR,
        reference_logprobs_BR=answers.reference_logprobs_BR,
        weights_BR=importance_weight(answers.logprobs_BR, answers.rollout_logprobs_BR, IMPORTANCE_CAP),
        advantages_BR=advantages_BR,
        values_BR=answers.values_BR,
        returns_BR=returns_BR,
    )


def fills_old_logprobs_in_step(config: LearnerConfig) -> bool:
    """Whether the old policy's log-probabilities are needed only in a step's one optimizer step, which computes them of itself.

    So no advantage may rest on them or on values, and no answer may stay out of the step.
    """
    whole = config.epochs * config.minibatches == 1 and config.truncation != "mask"
    return whole and not ALGORITHMS.load(config.algorithm).critic and kl_estimator(config) in LOSS_KL


def kl_estimator(config: LearnerConfig) -> KLEstimator:
    """The estimator that was asked for, or the algorithm's own."""
    return config.kl.estimator or ALGORITHMS.load(config.algorithm).kl


def groups_of(completions: Sequence[Completion]) -> torch.Tensor:
    """The number of each answer's group, int64 [N]: answers to prompts of the same tokens share one."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(answer.prompt.token_ids, len(numbers)) for answer in completions])


def stack_rows(rows: Sequence[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Rows of up to `width` entries, float32 [rows, width], 0 behind their ends."""
    padded = torch.zeros(len(rows), width, device=device)
    for place, row in enumerate(rows):
        padded[place, : row.shape[0]] = row
    return padded


def check_groups(algorithm: str, completions: Sequence[Completion]) -> None:
    """Raise ValueError, naming the id, for a prompt with one answer only: `algorithm` compares answers to one prompt."""
    sizes = Counter(completion.prompt.token_ids for completion in completions)
    for completion in completions:
        if sizes[completion.prompt.token_ids] == 1:
            raise ValueError(f"{algorithm} needs at least 2 answers to each prompt, got 1 to that of {completion.prompt.id!r}")


def check_answer(completion: Completion, version: int, staleness: int, max_length: int) -> None:
    """Raise ValueError, naming the id, unless policy `version` may learn from it: written by weights at most `staleness` versions
    older, at most `max_length` tokens with its prompt, a log-probability for each of its own."""
    name, length = completion.prompt.id, len(completion.prompt.token_ids) + len(completion.token_ids)
    oldest, newest = completion.oldest_version, completion.policy_version
    if not version - staleness <= oldest <= newest <= version:
        allowed = f"{version - staleness} to {version}" if staleness else version
        got = newest if oldest == newest else f"{oldest} to {newest}"
        raise ValueError(f"answer {name!r} must come from policy version {allowed}, got {got}")
    if not completion.token_ids or not completion.prompt.token_ids:
        raise ValueError(f"answer {name!r} and its prompt must have at least one token each")
    if len(completion.logprobs) != len(completion.token_ids):
        raise ValueError(
            f"answer {name!r} must have one logprob per token, got {len(completion.logprobs)} for {len(completion.token_ids)}"
        )
    if length > max_length:
        raise ValueError(f"answer {name!r} with its prompt must have at most {max_length} tokens, got {length}")


def answer_metrics(scored: Sequence[Scored], version: int) -> dict[str, float]:
    """Means over a step's answers; `staleness` is that of the policy `version` over the weights that wrote a token."""
    answers = len(scored)
    tokens = sum(len(answer.completion.token_ids) for answer in scored)
    return {
        "reward": sum(answer.reward for answer in scored) / answers,
        "response_length": tokens / answers,
        "truncated": sum(answer.completion.stop_reason == "length" for answer in scored) / answers,
        "tokens": float(tokens),
        "staleness": sum(_lag(answer.completion, version) for answer in scored) / tokens,
    }


def _lag(completion: Completion, version: int) -> int:
    """Versions between `version` and the weights that wrote a token, summed over tokens."""
    spans = completion.spans or (Span(completion.policy_version, len(completion.token_ids)),)
    return sum((version - span.version) * span.tokens for span in spans)
