"""How large a model is, from its configuration alone, and how many bytes each use of it takes.

`width` is the bytes of one number (WIDTHS). Arithmetic only: torch is imported where a model's own configuration is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from causalrm_ray.types import LoraTargets

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GROUP = 16  # rows, at most, that share one pass through the backbone of a reward model
GROUP_TOKENS = 2048  # tokens of such a pass, pads included, unless one row alone has more
KEPT_TOKENS = (
    4096  # tokens of a reward model's batch whose activations are kept for the backward pass; others' are computed again
)
WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes of a number
MOMENTS_BYTES = 8  # Adam's two moments of a parameter, float32
MASTER_BYTES = 4  # the float32 copy that bfloat16 weights are updated in
# Numbers that a decoder layer keeps per token and hidden unit for the backward pass: 34 bytes at 16 bits, less
# attention's square (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2).
ACTIVATIONS = 17
LOGIT_COPIES = 4  # of [tokens, vocabulary] in float32: logits, log-probabilities, their exponentials, a gradient


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts that memory depends on; `backbone` are the parameters without those of the output head that it does not share."""

    parameters: int
    backbone: int
    layers: int
    hidden: int
    vocabulary: int
    linear_widths: int  # inputs and outputs of the linear layers that adapters would be at, added up
    kv_width: int  # numbers kept per token and layer: keys and values of all key-value heads

    def training_bytes(self, width: int, ranks: int, zero_stage: int, critic: bool, lora: int = 0, offload: bool = False) -> int:
        """Weights, gradients and optimizer state on one of `ranks`: the policy, its reference, and its critic, a second backbone.

        Per trained parameter, bytes: weights w, gradients w, Adam's moments 8, and for 16-bit weights a float32 master 4. ZeRO 1
        divides moments and master over ranks, 2 gradients too, 3 weights too: Rajbhandari et al. 2020 (arXiv 1910.02054),
        section 3. With `offload` moments and master (under ZeRO 3 weights, too) lie elsewhere. With adapters of rank `lora`, all
        three stand on one frozen model.
        """
        models = self.parameters + (self.backbone if critic else 0)
        trained = lora * self.linear_widths * (2 if critic else 1) if lora else models
        state = 0 if offload else MOMENTS_BYTES + (MASTER_BYTES if width < MASTER_BYTES else 0)
        weights = 0 if offload and zero_stage == 3 else width
        parts = [(state, 1), (width, 2), (weights, 3)]  # (bytes, the ZeRO stage that divides them)
        return self.weight_bytes(width) + sum(trained * size // (ranks if zero_stage >= stage else 1) for size, stage in parts)

    def activation_bytes(
        self, width: int, tokens: int, critic: bool = False, checkpointing: bool = False, training: bool = True
    ) -> int:
        """What the backward pass of `tokens` tokens keeps, logits included, without attention's square; with `checkpointing`, of
        each layer its input, and all of one; or, not `training`, what one layer takes."""
        layer = self.hidden * ACTIVATIONS * width
        if not training:
            return tokens * layer
        kept = self.layers * self.hidden * width + layer if checkpointing else layer * self.layers
        return tokens * (kept * (2 if critic else 1) + self.vocabulary * LOGIT_COPIES * 4)

    def weight_bytes(self, width: int) -> int:
        """The weights alone."""
        return self.parameters * width

    def cache_bytes(self, width: int, tokens: int) -> int:
        """Keys and values of `tokens` tokens."""
        return tokens * self.layers * self.kv_width * width


def model_size(model: str, targets: LoraTargets = "auto") -> ModelSize:
    """The size of a local folder's or hub id's causal language model, for adapters at `targets`; its weights are not read."""
    from causalrm_ray.models.lora import linear_layers

    blank = skeleton(model)
    text = blank.config.get_text_config()
    return ModelSize(
        parameters=blank.num_parameters(),
        backbone=blank.base_model.num_parameters(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        linear_widths=sum(sum(layer.weight.shape) for layer in linear_layers(blank, targets).values()),
        kv_width=kv_width(text),
    )


@lru_cache(maxsize=4)
def skeleton(model: str) -> Any:
    """The model of a folder or hub id without memory for its weights. It is shared: change nothing in it."""
    import torch
    from transformers import AutoModelForCausalLM

    from causalrm_ray.models.kernels import text_config

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text_config(model), trust_remote_code=False)


def kv_width(config: PretrainedConfig) -> int:
    """Numbers kept per token and layer, keys and values of all key-value heads, by a text model's configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
