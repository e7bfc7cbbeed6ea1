"""Policy and critic in one module: a causal language model, and a value head on a backbone of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from causalrm_ray.errors import InputError
from causalrm_ray.models.kernels import load, use_onednn
from causalrm_ray.models.lora import with_adapter
from causalrm_ray.models.token_batch import TokenBatch, read, shares_prompts
from causalrm_ray.rl.policy_loss import entropy, log_distribution, token_logprobs
from causalrm_ray.types import LoraTargets


class TokenOutputs(NamedTuple):
    """Of each token of an answer: its log-probability, the entropy of its distribution (nats), and the value of the text before
    it, 0 without a critic."""

    logprobs_BR: torch.Tensor
    entropy_BR: torch.Tensor
    values_BR: torch.Tensor


class ActorCritic(nn.Module):
    """A causal language model `policy` and, if asked for, a critic that starts as a copy of its backbone, with a value head at 0.

    They share no trained weights, so neither objective disturbs the other. With `lora`, the rank of their adapters, both stand on
    the frozen model that was given, each with an adapter of its own, at the layers `targets`, drawn from `seed`, and that model
    itself is `reference`.
    The module never enters training mode: dropout would make the ratio of new to old probabilities noise.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: bool = True,
        lora: int = 0,
        seed: int = 0,
        checkpointing: bool = False,
        targets: LoraTargets = "auto",
    ) -> None:
        super().__init__()
        self.policy = with_adapter(policy, lora, seed, targets) if lora else policy
        self.critic = None
        if critic:
            backbone: Any = policy.base_model
            self.critic = with_adapter(backbone, lora, seed, targets) if lora else copy.deepcopy(backbone)
            self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=policy.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.reference = Reference(policy) if lora else None
        # With checkpointing a layer runs twice, and would put its keys and values into the cache twice.
        self.shares_prompts = shares_prompts(policy) and not checkpointing
        if checkpointing:
            for model in (self.policy, self.critic):
                if model is not None:
                    _checkpoint(model)
        self.train(False)

    def train(self, mode: bool = True) -> ActorCritic:
        """Stay in evaluation mode whatever `mode` says; gradients flow all the same."""
        super().train(False)
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = layer.gradient_checkpointing  # transformers checkpoints in training only; see _checkpoint
        return self

    def forward(self, batch: TokenBatch, temperature: float, reference: bool = False) -> TokenOutputs:
        """Outputs [B, R] about the answers' tokens; past an answer's end those of its last token.

        The log-probability of each at `temperature` given all tokens before it, and the value of those before it was written.
        Entropy carries no gradient. With `reference` (LoRA only) the log-probabilities are the reference's, all else is 0.
        """
        if reference:
            if self.reference is None:
                raise ValueError("reference must be False without LoRA, got True")
            logprobs_BR = self.reference(batch, temperature)
            return TokenOutputs(logprobs_BR, torch.zeros_like(logprobs_BR), torch.zeros_like(logprobs_BR))
        log_distribution_BKV = _log_distribution(self.policy, batch, temperature)
        logprobs_BK = token_logprobs(log_distribution_BKV, batch.targets_BK)
        values_BK = torch.zeros_like(logprobs_BK)
        if self.critic is not None:
            hidden_BKH = read(self.critic, batch).last_hidden_state[:, -batch.targets_BK.shape[1] :]
            values_BK = self.value_head(hidden_BKH).squeeze(-1).float()
        outputs = (logprobs_BK, entropy(log_distribution_BKV), values_BK)
        return TokenOutputs(*(field.gather(1, batch.answer_BR) for field in outputs))

    def policy_parameters(self) -> list[nn.Parameter]:
        """The policy's that are trained."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's that are trained, with its head; empty without a critic."""
        if self.critic is None:
            return []
        critic = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
        return [*critic, *self.value_head.parameters()]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the frozen model, which comes from its own folder."""
        frozen = self._frozen()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name not in frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What `state_dict` gave."""
        return super().load_state_dict({**self._frozen(), **state_dict}, strict, assign)

    def _frozen(self) -> dict[str, nn.Parameter]:
        named = self.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not parameter.requires_grad}


class Reference(nn.Module):
    """The policy before any update, frozen."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, batch: TokenBatch, temperature: float) -> torch.Tensor:
        """Log-probabilities [B, R], in the places of ActorCritic's."""
        logprobs_BK = token_logprobs(_log_distribution(self.policy, batch, temperature), batch.targets_BK)
        return logprobs_BK.gather(1, batch.answer_BR)


def load_policy(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a local folder or hub id, in `dtype`; of one that also sees or hears, its language model.

    Raises InputError where its files do not hold all weights.
    """
    policy, loading = load(AutoModelForCausalLM, model, dtype)
    if missing := loading["missing_keys"]:
        raise InputError(f"the weights of {model} must cover {type(policy).__name__}, {min(missing)} is missing")
    use_onednn(policy)
    return policy


def _checkpoint(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, which recomputes the rest: Chen et al. 2016 (arXiv 1604.06174).

    transformers checkpoints in training mode only, so each layer is in that mode until its forward pass has begun.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"learner.save_memory=checkpointing needs layers that transformers can checkpoint, {type(model)} has none"
        )
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", False))
        layer.register_forward_hook(lambda layer, *_: setattr(layer, "training", True), always_call=True)


def _log_distribution(policy: PreTrainedModel, batch: TokenBatch, temperature: float) -> torch.Tensor:
    """[B, K, V] over the tokens that stand in the places of the batch's targets."""
    return log_distribution(read(policy, batch, logits_to_keep=batch.targets_BK.shape[1]).logits, temperature)
