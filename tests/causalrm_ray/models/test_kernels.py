"""Linear layers by oneDNN against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from causalrm_ray.models.kernels import OneDnnLinear, use_onednn


def both(bias: bool) -> tuple[OneDnnLinear, nn.Linear]:
    torch.manual_seed(0)
    fast = OneDnnLinear(37, 23, bias=bias)
    exact = nn.Linear(37, 23, bias=bias, dtype=torch.float64)
    exact.load_state_dict(fast.state_dict())
    return fast, exact


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (4, 6, 37)])
def test_values_and_gradients_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    fast, exact = both(bias)
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    found, expected = fast(x), exact(y)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(fast(x), found)
    factors = torch.randn(found.shape)
    (found * factors).sum().backward()
    (expected * factors.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)
    for mine, its in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-5, atol=1e-5)


def test_slices_and_expanded_gradients_are_read_right() -> None:
    fast, exact = both(bias=False)
    x = torch.randn(4, 9, 74, requires_grad=True)
    y = x.detach().double().requires_grad_()
    fast(x[:, 2:, ::2]).sum().backward()  # the gradient of a sum has strides of 0
    exact(y[:, 2:, ::2]).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_right() -> None:
    fast, exact = both(bias=False)
    x = torch.randn(3, 37, requires_grad=True)
    y = x.detach().double().requires_grad_()
    for layer, rows in ((fast, x), (exact, y)):
        (slope,) = torch.autograd.grad(layer(rows).square().sum(), rows, create_graph=True)
        slope.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_layer_passes_the_gradient_on_and_gets_none() -> None:
    fast, _ = both(bias=False)
    fast.requires_grad_(False)
    x = torch.randn(3, 37, requires_grad=True)
    fast(x).sum().backward()
    assert fast.weight.grad is None
    torch.testing.assert_close(x.grad, fast.weight.sum(dim=0).expand(3, 37))


def test_other_precisions_are_left_to_torch() -> None:
    fast, _ = both(bias=True)
    x = torch.randn(3, 37)
    expected = nn.functional.linear(x.bfloat16(), fast.weight.bfloat16(), fast.bias.bfloat16())
    assert torch.equal(fast.bfloat16()(x.bfloat16()), expected)


def test_only_plain_linear_layers_are_changed_and_no_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Own(4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_onednn(model)
    assert [type(layer) for layer in model] == [OneDnnLinear, nn.LayerNorm, Own]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    other = nn.Linear(4, 4)
    use_onednn(other)
    assert type(other) is nn.Linear
