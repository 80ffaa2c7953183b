"""Each token sees itself and what came before in its document, whichever kernel runs; and which kernel that is."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from dsllm.model import attention, block_causal
from dsllm.model.attention import cached_attention, causal_attention, document_attention


def inputs(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, heads, tokens, width), (2, kv_heads, tokens, width), (2, kv_heads, tokens, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def values_and_gradients(function, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*arguments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, arguments, upstream)]


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest element, or to 1: a single token's query has a gradient of 0."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1.0)


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("tokens", [40, attention.BLOCK_CAUSAL_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whichever_kernel_is_chosen_the_future_is_hidden(tokens: int, dtype: torch.dtype):
    query, key, value = inputs(2, 1, tokens, dtype)
    before = causal_attention(query, key, value)
    with torch.no_grad():
        key[:, :, 30:] = 5
        value[:, :, 30:] = 5
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


def test_dropout_drops_and_is_repeatable():
    arguments = inputs(2, 2, 20, torch.bfloat16)
    torch.manual_seed(0)
    first = causal_attention(*arguments, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, causal_attention(*arguments, dropout=0.5))
    assert not torch.equal(first, causal_attention(*arguments))


@pytest.mark.parametrize("num_new", [1, 3, 10])
def test_cached_attention_is_the_end_of_the_whole(num_new: int):
    query, key, value = inputs(4, 2, 10, torch.float64)
    found = cached_attention(query[:, :, -num_new:], key, value)
    assert deviation(found, torch_attention(query, key, value)[:, :, -num_new:]) < 1e-13


CPU = torch.device("cpu")
LENGTHS = [[300], [1, 1, 128, 170], [128, 50, 122]]  # one document, tiny and long ones, a cut at a block's end


def documents_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def each_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Every document of LENGTHS by itself through torch's attention."""
    rows = []
    for row, lengths in enumerate(LENGTHS):
        parts = zip(*(x[row : row + 1].split(lengths, 2) for x in (query, key, value)), strict=True)
        rows.append(torch.cat([torch_attention(*part) for part in parts], 2))
    return torch.cat(rows)


def packed(heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, n, 300, 16) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def flash_by_its_documentation(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch says that varlen_attn computes: it needs a GPU, what is handed to it does not."""
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
    parts = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        rows = [x[start:stop].transpose(0, 1)[None] for x in (query, key, value)]
        parts.append(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("kernel", ["block causal", "masked", "varlen"])
def test_each_document_is_as_if_it_were_alone(monkeypatch, kernel: str, heads: int, kv_heads: int):
    documents = documents_of(LENGTHS)
    if kernel == "block causal":  # in fp64 it can be judged; it is chosen for bf16
        blocks = block_causal.document_blocks(documents, torch.float64)
        attend = partial(attention._block_causal_documents, dropout=0.0, blocks=blocks)
    elif kernel == "masked":
        attend = partial(document_attention(documents, CPU, torch.float64, 0.0), dropout=0.0)
    else:
        monkeypatch.setattr(attention, "varlen_attn", flash_by_its_documentation, raising=False)
        attend = partial(attention._varlen_attention, dropout=0.0, boundaries=attention._boundaries(documents))
    arguments = packed(heads, kv_heads, torch.float64)
    found, wanted = values_and_gradients(attend, arguments), values_and_gradients(each_alone, arguments)
    # fp64 and sums of up to 300 terms in another order; where the future or another document shows, it is 1e-2 and more
    assert all(deviation(f, w) < 1e-13 for f, w in zip(found, wanted, strict=True))


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "dropout", "kernel"),
    [
        (CPU, torch.bfloat16, 1024, 0.0, "block causal"),
        (CPU, torch.bfloat16, 1025, 0.0, "torch"),
        (CPU, torch.bfloat16, 1024, 0.1, "torch"),
        (CPU, torch.float32, 16, 0.0, "torch"),
        (GPU, torch.bfloat16, 4096, 0.0, "varlen"),
        (GPU, torch.float16, 4096, 0.0, "varlen"),
        (GPU, torch.bfloat16, 4096, 0.1, "torch"),
        (GPU, torch.float32, 4096, 0.0, "torch"),
    ],
)
def test_which_kernel_runs_where(monkeypatch, device, dtype, tokens, dropout, kernel):
    monkeypatch.setattr(attention, "HAS_VARLEN", True)
    assert attention._choose_kernel(device, dtype, tokens, dropout) == kernel
    monkeypatch.setattr(attention, "HAS_VARLEN", False)
    without = attention._choose_kernel(device, dtype, tokens, dropout)
    assert without == ("torch" if kernel == "varlen" else kernel)


@pytest.mark.slow
def test_a_torch_without_varlen_attn_masks_documents():
    program = """
import sys, torch
sys.modules["torch.nn.attention.varlen"] = None  # importing it raises ImportError
torch.__version__ = "2.11.0+cu128"
from dsllm.model import attention
assert not attention.HAS_VARLEN
documents = torch.tensor([[0, 0, 1]])
attend = attention.document_attention(documents, torch.device("cpu"), torch.float32, 0.0)
x = torch.randn(1, 2, 3, 4)
assert torch.allclose(attend(x, x, x, 0.0)[:, :, 2], x[:, :, 2])  # alone in its document
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_documents_in_bf16_are_as_exact_as_bf16_allows():
    arguments = packed(4, 2, torch.bfloat16)
    attend = partial(document_attention(documents_of(LENGTHS), CPU, torch.bfloat16, 0.0), dropout=0.0)
    wide = [a.detach().double().requires_grad_() for a in arguments]
    found, wanted = values_and_gradients(attend, arguments), values_and_gradients(each_alone, wide)
    assert all(deviation(f, w) < 2e-2 for f, w in zip(found, wanted, strict=True))  # as above, without documents


def test_boundaries_come_in_few_lengths_and_end_with_the_tokens():
    # 8 documents in 900 tokens; 8 is a power of two
    assert attention._boundaries(documents_of(LENGTHS)).tolist() == [0, 300, 301, 302, 430, 600, 728, 778, 900]
    assert attention._boundaries(documents_of([[5], [2, 3]])).tolist() == [0, 5, 7, 10, 10]
