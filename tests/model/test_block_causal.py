"""The block-causal kernel equals torch's attention, values and gradients."""

import pytest
import torch

from dsllm.model import block_causal
from dsllm.model.block_causal import block_causal_attention
from tests.model.test_attention import deviation, documents_of, inputs, torch_attention, values_and_gradients


@pytest.mark.parametrize("tokens", [1, 5, 128, 200, 300])  # one block, a whole block, blocks with a shorter last
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-13),
        (torch.float32, 5e-6),
    ],  # a few hundred terms of random sign, relative to the largest element
)
def test_block_causal_equals_torch(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float):
    arguments = inputs(heads, kv_heads, tokens, dtype)
    found = values_and_gradients(block_causal_attention, arguments)
    wanted = values_and_gradients(torch_attention, arguments)
    assert all(deviation(f, w) < tolerance for f, w in zip(found, wanted, strict=True))


def test_in_bf16_it_is_as_exact_as_bf16_allows():
    # Scores and weights are rounded to bf16 (2^-9 = 2e-3 each) on the way; torch's own kernel is about as far off.
    arguments = inputs(4, 2, 300, torch.bfloat16)
    wide = [a.detach().double().requires_grad_() for a in arguments]
    found = values_and_gradients(block_causal_attention, arguments)
    wanted = values_and_gradients(torch_attention, wide)
    assert all(deviation(f, w) < 2e-2 for f, w in zip(found, wanted, strict=True))


def test_gradcheck_of_the_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_causal, "BLOCK_TOKENS", 2)
    assert torch.autograd.gradcheck(block_causal_attention, inputs(4, 2, 5, torch.float64, width=3), fast_mode=True)


def test_inputs_need_not_be_contiguous():
    arguments = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in inputs(4, 2, 40, torch.float64)]
    assert deviation(block_causal_attention(*arguments), torch_attention(*arguments)) < 1e-13


def test_a_block_leaves_out_the_keys_of_documents_that_ended():
    blocks = block_causal.document_blocks(documents_of([[128, 172], [100, 200]]), torch.float32)
    assert [(b.start, b.stop, b.first) for b in blocks] == [(0, 128, 0), (128, 256, 100), (256, 300, 100)]
