"""The linear function: gradients, dtypes, and what it keeps alive."""

import torch
from torch.nn import functional as F

from dsllm.model.linear import linear


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def test_gradients_of_all_inputs():
    assert torch.autograd.gradcheck(linear, (rand(2, 3, 5), rand(4, 5), rand(4)))
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w), (rand(3, 5), rand(4, 5)))


def test_it_computes_in_the_inputs_dtype_and_gives_gradients_in_the_parameters():
    x, weight, bias = rand(2, 3, 5, dtype=torch.bfloat16), rand(4, 5, dtype=torch.float32), rand(4, dtype=torch.float32)
    out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x, weight.bfloat16(), bias.bfloat16()))
    gradients = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_only_the_input_and_the_parameter_itself_are_kept():
    # What torch would keep, a cast copy or a transposed view, outlives a weight that ZeRO-3 releases.
    x, weight = rand(8, 5, dtype=torch.bfloat16), torch.nn.Parameter(rand(4, 5, dtype=torch.float32).detach())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, weight)
    assert {id(tensor) for tensor in kept} == {id(x), id(weight)}


def test_a_weight_that_is_released_between_the_passes_is_used_as_it_is_then():
    x, weight = rand(8, 5, dtype=torch.float32), torch.nn.Parameter(rand(4, 5, dtype=torch.float32).detach())
    values, out = weight.detach().clone(), linear(x, weight)
    weight.data = torch.empty(0)  # as ZeRO-3 releases a parameter
    weight.data = values  # and gathers it again
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(grad, values.sum(0).expand(8, 5))
