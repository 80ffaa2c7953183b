"""Causal attention over whole sequences, or within packed documents; which kernel runs where.

| device, dtype | whole sequences | packed documents |
|---|---|---|
| CPU, bf16, up to BLOCK_CAUSAL_TOKENS tokens, no dropout | block causal | block causal |
| GPU, 16 bits, no dropout, torch 2.13 or newer | torch chooses (flash) | varlen_attn (flash) |
| everything else | torch chooses | torch chooses, under a mask of B x T x T |
"""

# B sequences, H query heads, K key and value heads (H a multiple of K), T tokens, D width of a head.

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from dsllm.model.block_causal import QueryBlock, block_causal_attention, document_blocks

HAS_VARLEN = TorchVersion(torch.__version__) >= "2.13"  # older ones have no varlen_attn, or one without enable_gqa
if HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""query [B, H, T, D], key and value [B, K, T, D], dropout -> [B, H, T, D]"""

BLOCK_CAUSAL_TOKENS = 1024
"""Longest sequence for the block-causal kernel: it keeps the attention weights, whose size grows with the square of the
length, and it rounds each sum over blocks to the compute dtype, so there should be few blocks."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Each token attends to itself and to the tokens before it.

    On CPUs in bf16 torch's fused kernel is far slower than a matrix product. Batched products over causal prefixes take
    half its time, forward and backward, at 512 tokens.

    Args:
        query: [B, H, T, D]
        key, value: [B, K, T, D]
        dropout: probability of dropping an attention weight
    Returns:
        [B, H, T, D]
    """
    if _choose_kernel(query.device, query.dtype, query.shape[2], dropout) == "block causal":
        return block_causal_attention(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def document_attention(documents: Tensor, device: torch.device, dtype: torch.dtype, dropout: float) -> Attend:
    """Causal attention within documents. Made once for all layers of a forward pass.

    Args:
        documents: [B, T] the number of each token's document in its sequence, rising; on the CPU, whatever the device,
            because its boundaries are counted on the host, for which a GPU would have to be waited for
        device, dtype: where the layers compute, and in which type
    """
    kernel = _choose_kernel(device, dtype, documents.shape[1], dropout)
    if kernel == "block causal":
        return partial(_block_causal_documents, blocks=document_blocks(documents, dtype))
    if kernel == "varlen":
        return partial(_varlen_attention, boundaries=_boundaries(documents).to(device, non_blocking=True))
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return partial(_masked_attention, visible=same.tril().to(device, non_blocking=True))


def cached_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last S of T tokens attend to all tokens up to themselves.

    Args:
        query: [B, H, S, D]
        key, value: [B, K, T, D]
    Returns:
        [B, H, S, D]
    """
    num_new, num_all = query.shape[2], key.shape[2]
    visible = torch.ones(num_new, num_all, dtype=torch.bool, device=query.device).tril(num_all - num_new)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)


def _choose_kernel(
    device: torch.device, dtype: torch.dtype, num_tokens: int, dropout: float
) -> Literal["block causal", "varlen", "torch"]:
    """The table at the top of this file."""
    if dropout > 0.0:  # the other two kernels have none
        return "torch"
    if device.type == "cpu" and dtype == torch.bfloat16 and num_tokens <= BLOCK_CAUSAL_TOKENS:
        return "block causal"
    if device.type == "cuda" and dtype != torch.float32 and HAS_VARLEN:
        return "varlen"
    return "torch"


@torch.compiler.disable  # where a block's keys begin differs from batch to batch; compiled, it would be a constant
def _block_causal_documents(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, blocks: Sequence[QueryBlock]
) -> Tensor:
    return block_causal_attention(query, key, value, blocks)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, visible: Tensor) -> Tensor:
    """torch's attention under a mask; visible is [B, 1, T, T], True where a query sees a key."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout, enable_gqa=grouped)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, boundaries: Tensor) -> Tensor:
    """Flash attention over the documents of the whole batch as one row of tokens; boundaries from `_boundaries`."""
    batch, heads, num_tokens, width = query.shape
    queries, keys, values = (x.transpose(1, 2).reshape(batch * num_tokens, -1, width) for x in (query, key, value))
    out = varlen_attn(
        queries,
        keys,
        values,
        boundaries,
        boundaries,
        num_tokens,  # an upper bound on a document's length, known without counting
        num_tokens,
        window_size=(-1, 0),  # all keys before the query, none after
        enable_gqa=heads != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.view(batch, num_tokens, heads, width).transpose(1, 2)


def _boundaries(documents: Tensor) -> Tensor:
    """Where each document begins among all tokens of the batch, and the number of tokens: int32 [2^n + 1].

    Empty documents at the end pad it to a power of two, so that compiled layers see few different lengths.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.view(-1).nonzero().view(-1)
    length = 1 << (len(starts) - 1).bit_length()
    padded = torch.full((length + 1,), documents.numel(), dtype=torch.int32)
    padded[: len(starts)] = starts
    return padded
