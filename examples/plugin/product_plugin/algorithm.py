"""An algorithm: leave-one-out advantages, and an importance-weighted loss without a clip."""

from __future__ import annotations

import torch

from causalrm_ray.rl.advantage import rloo
from causalrm_ray.rl.algorithms import Algorithm, per_answer
from causalrm_ray.rl.policy_loss import Clip


def plain_loss(logprobs_BR: torch.Tensor, ratio_BR: torch.Tensor, advantages_BR: torch.Tensor, clip: Clip) -> torch.Tensor:
    """-r A of each token: the policy gradient itself, for steps so small that nothing needs a clip. [B, R]."""
    return -ratio_BR * advantages_BR


PLAIN_RLOO = Algorithm(per_answer(rloo), "k1", loss=plain_loss, grouped=True)
