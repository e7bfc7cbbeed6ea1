"""Policy and critic in one module: a causal language model, and a value head on a backbone of its own."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from causalrm_ray.losses.policy import entropy, log_distribution, token_logprobs
from causalrm_ray.models.linear import use_onednn


class TokenOutputs(NamedTuple):
    """What the model says of each token: its log-probability, the entropy there (nats), and the value of the text before it.

    Without a critic, values are 0.
    """

    logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    values_BT: torch.Tensor

    def at(self, positions_BR: torch.Tensor) -> TokenOutputs:
        """The entries [B, R] at these positions of each row."""
        return TokenOutputs(*(field.gather(1, positions_BR) for field in self))


class ActorCritic(nn.Module):
    """A causal language model `policy` and, if asked for, a critic that starts as a copy of its backbone, with a value head at 0.

    They share no weights, so neither objective disturbs the other. The module never enters training mode: dropout would
    make the ratio of new to old probabilities noise.
    """

    def __init__(self, policy: PreTrainedModel, critic: bool = True) -> None:
        super().__init__()
        self.policy = policy
        self.critic = copy.deepcopy(policy.base_model) if critic else None
        if critic:
            self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=policy.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.train(False)

    def train(self, mode: bool = True) -> ActorCritic:
        """Stay in evaluation mode whatever `mode` says; gradients flow all the same."""
        return super().train(False)

    def forward(self, input_ids: torch.Tensor, start: int, temperature: float) -> TokenOutputs:
        """Outputs [B, T - 1 - start] about the tokens at positions start + 1, ..., T - 1 of `input_ids` [B, T].

        Entry k is about token start + 1 + k: its log-probability at `temperature` given all tokens before it, and the
        value of those tokens before it was written. Rows are right-padded with any valid id: attention is causal and
        positions count from the left, so no real token sees a pad and no mask is needed. Entropy carries no gradient.
        """
        log_distribution_BTV, targets_BT = _log_distribution(self.policy, input_ids, start, temperature)
        logprobs_BT = token_logprobs(log_distribution_BTV, targets_BT)
        values_BT = torch.zeros_like(logprobs_BT)
        if self.critic is not None:
            hidden_BTH = self.critic(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state[:, start:]
            values_BT = self.value_head(hidden_BTH).squeeze(-1).float()
        return TokenOutputs(logprobs_BT, entropy(log_distribution_BTV.detach()), values_BT)

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's, with its head; none without a critic."""
        return [] if self.critic is None else [*self.critic.parameters(), *self.value_head.parameters()]


class Reference(nn.Module):
    """The policy before any update, frozen."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, start: int, temperature: float) -> torch.Tensor:
        """Log-probabilities [B, T - 1 - start], laid out as those of ActorCritic."""
        return token_logprobs(*_log_distribution(self.policy, input_ids, start, temperature))


def load_policy(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a local folder or hub id, in `dtype`."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    use_onednn(policy)
    return policy


def _log_distribution(
    policy: PreTrainedModel, input_ids: torch.Tensor, start: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    length = input_ids.shape[1]
    if not 0 <= start < length - 1:
        raise ValueError(f"start must be in [0, {length - 2}] for rows of {length} tokens, got {start}")
    logits_BTV = policy(input_ids=input_ids[:, :-1], use_cache=False, logits_to_keep=length - 1 - start).logits
    return log_distribution(logits_BTV, temperature), input_ids[:, start + 1 :]
