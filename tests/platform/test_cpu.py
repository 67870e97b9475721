"""What stands for CUDA kernels on the CPU computes what they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava_mcore.platform.cpu import add_weight_gradient, swiglu_gradient


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_gradient_of_swiglu(rows: int) -> None:
    torch.manual_seed(0)
    both = torch.randn(rows, 2 * 13, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    given = torch.randn(rows, 13, dtype=torch.float64)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, both, given)
    assert torch.allclose(swiglu_gradient(given, both.detach()), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_weight_gradients_are_added_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    inputs, gradients = torch.randn(37, 7).to(dtype), torch.randn(37, 5).to(dtype)
    kept = torch.randn(5, 7)
    total = kept.clone()
    add_weight_gradient(inputs, gradients, total)
    exact = kept.double() + gradients.double().t() @ inputs.double()
    assert total.dtype == torch.float32
    assert float((total - exact).abs().max()) <= tolerance * float(exact.abs().max())
