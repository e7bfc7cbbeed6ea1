"""Which kernels compute a model.

Linear layers on the CPU in float32: oneDNN, which torch itself uses for half precision only. For float32 torch asks MKL,
whose kernels leave half of an AMD processor's AVX-512 idle: oneDNN's are twice as fast there. The result is the same but for
the order of sums, and repeats to the bit. Attention: what computes what the model's config says, of its language model.
Dropout: eight elements drawn at once; on a CPU torch's own takes six times as long, half of what a small fit takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

# Where models of several parts keep their language model -> where it is by itself.
_LANGUAGE_MODEL = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}

# How weights are read: no code of a model's own is run, and no pickle is opened.
SAFE: Mapping[str, bool] = {"trust_remote_code": False, "use_safetensors": True}


def text_config(model: str) -> PreTrainedConfig:
    """The config of a model (folder or hub id); of one that also takes images or sound, that of its language model."""
    return AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()


def is_part(model: str) -> bool:
    """Whether the language model of a folder or hub id is a part of a larger one."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return config.get_text_config().model_type != config.model_type


def load(
    auto: Any, model: str, dtype: torch.dtype, reading: Mapping[str, Any] | None = None, **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model of a folder or hub id by one of transformers' Auto classes, and what its files lack or hold in another shape
    ("missing_keys", "mismatched_keys").

    Of one that also takes images or sound it is the language model alone, as which it will be saved. `reading` is passed to
    `from_pretrained`, `options` are set in the config.
    """
    config, part = text_config(model), is_part(model)
    for name, value in options.items():
        setattr(config, name, value)
    # Fused kernels (sdpa) leave out a soft cap of attention's logits, as Gemma 2 has it.
    kernel = "eager" if getattr(config, "attn_logit_softcapping", None) is not None else None
    found, loading = auto.from_pretrained(
        model,
        config=config,
        dtype=dtype,
        attn_implementation=kernel,
        key_mapping=_LANGUAGE_MODEL if part else None,
        output_loading_info=True,
        **SAFE,
        **(reading or {}),
    )
    if part:
        vars(found).pop("_weight_conversions", None)  # by which transformers would save it under the names that it had as a part
    return found, loading


class OneDnnLinear(nn.Linear):
    """A linear layer: oneDNN's on the CPU in float32, torch's own elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(input)
        product = _multiply(input.reshape(-1, input.shape[-1]), self.weight)
        output = product if self.bias is None else product + self.bias
        return output.view(*input.shape[:-1], output.shape[-1])


def use_onednn(module: nn.Module) -> None:
    """Let oneDNN compute the linear layers of `module` from now on, where it is the faster; names and weights stay."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = OneDnnLinear


class _Product(torch.autograd.Function):
    """rows [M, K] weight^T [K, N]."""

    @staticmethod
    def forward(ctx: Any, rows_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MK, weight_NK)
        return _product(rows_MK, weight_NK)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows_MK, weight_NK = ctx.saved_tensors
        grad_MN = grad_outputs[0].contiguous()  # an expanded one has strides of 0
        of_rows = _multiply(grad_MN, weight_NK.t()) if ctx.needs_input_grad[0] else None
        return of_rows, _multiply(grad_MN.t(), rows_MK.t()) if ctx.needs_input_grad[1] else None


def _multiply(left_MK: Tensor, right_NK: Tensor) -> Any:
    return (_Product.apply if torch.is_grad_enabled() else _product)(left_MK, right_NK)


def _product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`x` [...], in training with each element set to 0 with probability `p` in [0, 1) and the others scaled to keep the mean.

    `p` is taken to the nearest 1/256. Srivastava et al. 2014.
    """
    dropped = round(256 * p)
    if not training or dropped == 0:
        return x
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    keep = draws.view(torch.uint8)[: x.numel()].view_as(x) >= dropped
    return x * keep.to(x.dtype).mul_(256 / (256 - dropped))


class Dropout(nn.Module):
    """`dropout` as a layer."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= round(256 * p) < 256:
            raise ValueError(f"dropout must be at least 0 and below 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """`x` [...], some of it 0 in training."""
        return dropout(x, self.p, self.training)
