"""A processor that rounds another way: `python -m pytest -p tests.rounding tests/causalrm_ray` finds tests that rest on a bit.

Logarithms, exponentials, products of matrices and sums are not the same to the last bit on all processors. Under this plugin each
of their results in float32 and float64 that is not exact is one unit in the last place off, up or down by its own bits: equal
results stay equal, so repeated runs still repeat. A test that then fails compares what it should not compare to the bit. With
ROUNDING=1 in the environment each result moves the other way: run both.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
EXACT_BITS = {torch.float32: 12, torch.float64: 29}  # a number whose last bits are 0 counts as exact, such as 0.25 or 3
POINTWISE = "exp exp2 expm1 log log1p log2 log10 pow sigmoid tanh erf logit sin cos rsqrt special_expit xlogy logaddexp"
ACTIVATIONS = "gelu silu mish elu softplus log_sigmoid log_sigmoid_forward _softmax _log_softmax logsumexp logcumsumexp"
BACKWARD = "sigmoid_backward tanh_backward softplus_backward _softmax_backward_data _log_softmax_backward_data"
PRODUCTS = "mm bmm addmm baddbmm addmv mv dot matmul linear _linear_pointwise _scaled_dot_product_flash_attention_for_cpu"
SUMS = "sum mean var std norm linalg_vector_norm var_mean prod cumsum native_layer_norm"
LOSSES = "binary_cross_entropy binary_cross_entropy_with_logits mse_loss nll_loss_forward"
OTHER_WAY = int(os.environ.get("ROUNDING", "0"))
ROUNDED = set(" ".join((POINTWISE, ACTIVATIONS, BACKWARD, PRODUCTS, SUMS, LOSSES)).split())


class OtherRounding(TorchDispatchMode):
    """Moves the results of the operations in ROUNDED, also those in place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1].removesuffix("_") in ROUNDED:
            _move(result[0] if isinstance(result, tuple | list) else result)
        return result


@torch.no_grad()
def _move(result: Any) -> None:
    if not isinstance(result, torch.Tensor) or result.dtype not in INTEGERS or result.is_meta:
        return
    bits = result.detach().contiguous().view(INTEGERS[result.dtype])
    inexact = (bits & (2 ** EXACT_BITS[result.dtype] - 1) != 0) & result.isfinite()
    up = ((bits >> 3) ^ (bits >> 7) ^ (bits >> 11) ^ OTHER_WAY) & 1
    result.detach().copy_((bits + torch.where(inexact, 2 * up - 1, 0).to(bits.dtype)).view(result.dtype))


def pytest_configure() -> None:
    """From the first import to the last test."""
    OtherRounding().__enter__()
