"""The norms agree with their formulas, in value and gradient, in fp32 and bf16."""

import pytest
import torch

from dsllm.model.norm import layer_norm, rms_norm

EPSILON = 1e-5


def reference(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """In double precision, from the definition."""
    x = x.double()
    if kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # fp32: a few roundings of 6e-8 in sums over 96 elements. bf16: x and y are rounded to 2^-9 = 2e-3 of
    # the element, and the gradient is a sum of two such terms; both relative to the largest element.
    [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)],
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the small one shows a wrong epsilon
def test_value_and_gradients(kind: str, dtype: torch.dtype, tolerance: float, scale: float):
    generator = torch.Generator().manual_seed(0)
    x = (scale * (0.5 + torch.randn(3, 7, 96, generator=generator))).to(dtype).requires_grad_()
    weight = (1 + 0.5 * torch.randn(96, generator=generator)).requires_grad_()
    bias = torch.randn(96, generator=generator).requires_grad_()
    upstream = torch.randn(3, 7, 96, generator=generator).to(dtype)
    out = rms_norm(x, weight, EPSILON) if kind == "rms" else layer_norm(x, weight, bias, EPSILON)
    wanted = reference(kind, x, weight, bias)
    assert out.dtype == dtype
    inputs = (x, weight) if kind == "rms" else (x, weight, bias)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]
    expected = [wanted, *torch.autograd.grad(wanted, inputs, upstream.double())]
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().double(), other.detach().double()
        assert float((one - other).abs().max() / other.abs().max()) < tolerance


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_gradients_of_the_parameters_are_summed_in_fp32(kind: str):
    # torch's kernel for bf16 on CPUs sums them in bf16, and over 4096 rows is 5 % off. What is left here is the
    # rounding of single terms to bf16, 2^-9, which averages out.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 24, generator=generator).bfloat16()
    weight = torch.ones(24, requires_grad=True)
    bias = torch.zeros(24, requires_grad=True)
    upstream = torch.randn(4096, 24, generator=generator).bfloat16()
    inputs = (weight,) if kind == "rms" else (weight, bias)
    out = rms_norm(x, weight, EPSILON) if kind == "rms" else layer_norm(x, weight, bias, EPSILON)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(reference(kind, x, weight, bias), inputs, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_parameters_may_be_low_precision():
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8, dtype=torch.bfloat16)
    weight.requires_grad_()
    out = rms_norm(x, weight, EPSILON)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == out.dtype == torch.bfloat16
    assert layer_norm(x, weight, weight, EPSILON).dtype == torch.bfloat16
