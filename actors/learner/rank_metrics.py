"""Metrics over all learner ranks; every function is collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from causalrm_ray.rl.experience import TRAINING, Answers
from causalrm_ray.rl.policy_loss import kl_k1


class Step(NamedTuple):
    """One optimizer step on this rank: [sums of TRAINING, tokens, largest ratio]; the gradient norm."""

    figures: torch.Tensor
    norm: float


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    torch.distributed.all_reduce(value)
    return value


def rollout_metrics(own: Answers, answers: int) -> dict[str, float]:
    """Of a step's `answers`, `own` on this rank: KL from the reference, and how far learner and engine disagree."""
    kl_BR = kl_k1(own.logprobs_BR, own.reference_logprobs_BR)
    kept = (own.logprobs_BR - own.rollout_logprobs_BR)[own.mask_BR != 0].double()
    ratio = kept.exp()
    total = torch.stack([kl_BR.double().sum(), kept.abs().sum(), ratio.sum(), ratio.square().sum(), own.mask_BR.double().sum()])
    kl, absolute, weight, squared, tokens = all_reduce_sum(total).tolist()
    return {
        "kl": kl / answers,
        "importance_weight_mean": weight / tokens,
        "importance_weight_ess": weight**2 / squared / tokens,
        "logprob_mismatch_mean_abs": absolute / tokens,
        "logprob_mismatch_max_abs": _largest(torch.cat([kept.abs(), kept.new_zeros(1)]).max()),
    }


def step_metrics(steps: Sequence[Step], critic: bool) -> dict[str, float]:
    """Means over all tokens of all optimizer steps; the value loss only with a critic."""
    figures = torch.stack([step.figures for step in steps])
    *sums, tokens = all_reduce_sum(figures[:, :-1].sum(dim=0)).tolist()
    means = {name: value / tokens for name, value in zip(TRAINING, sums, strict=True)}
    if not critic:
        del means["value_loss"]
    return means | {"ratio_max": _largest(figures[:, -1].max()), "grad_norm": sum(step.norm for step in steps) / len(steps)}


def _largest(value: torch.Tensor) -> float:
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return float(value)
