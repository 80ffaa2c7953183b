"""Causal attention, over whole sequences or within packed documents: which kernel runs where."""

# B sequences, H query heads, K key and value heads (H a multiple of K), T tokens, D width of a head.

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from dsllm.model.block_causal import QueryBlock, block_causal_attention, document_blocks

HAS_VARLEN = TorchVersion(torch.__version__) >= "2.13"  # its interface is younger than torch's oldest version here
if HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""query [B, H, T, D], key and value [B, K, T, D], dropout -> [B, H, T, D]"""

BLOCK_CAUSAL_TOKENS = 1024
"""Longest sequence for the block-causal kernel. It keeps the attention weights, whose size grows with the square of the
length; and few blocks keep the sums over blocks short, which are rounded to the compute dtype."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Each token attends to itself and to the tokens before it.

    On CPUs in bf16 torch's fused kernel runs far below the speed of a matrix product, and batched products over causal
    prefixes do not: forward and backward take half the time at 512 tokens. Everywhere else, and with dropout, torch
    chooses.

    Args:
        query: [B, H, T, D]
        key, value: [B, K, T, D]
        dropout: probability of dropping an attention weight
    Returns:
        [B, H, T, D]
    """
    if _block_causal_is_faster(query.device, query.dtype, query.shape[2], dropout):
        return block_causal_attention(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def document_attention(documents: Tensor, device: torch.device, dtype: torch.dtype, dropout: float) -> Attend:
    """Causal attention in which no token sees another document. Made once for all layers of a forward pass.

    Args:
        documents: [B, T] the number of each token's document in its sequence, rising; on the CPU, whatever the device:
            its boundaries are counted on the host, and a GPU does not stop for it
        device, dtype: where and in what the layers compute
    """
    if _block_causal_is_faster(device, dtype, documents.shape[1], dropout):
        return partial(_block_causal_documents, blocks=document_blocks(documents, dtype))
    if HAS_VARLEN and device.type == "cuda" and dtype != torch.float32 and dropout == 0.0:
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


def _block_causal_is_faster(device: torch.device, dtype: torch.dtype, num_tokens: int, dropout: float) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and num_tokens <= BLOCK_CAUSAL_TOKENS and dropout == 0.0


@torch.compiler.disable  # where a block's keys begin differs from batch to batch, and would be compiled in
def _block_causal_documents(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, blocks: Sequence[QueryBlock]
) -> Tensor:
    return block_causal_attention(query, key, value, blocks)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, visible: Tensor) -> Tensor:
    """torch's attention under a mask [B, 1, T, T]."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout, enable_gqa=grouped)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, boundaries: Tensor) -> Tensor:
    """Flash attention over all documents of the batch in a row; boundaries as from `_boundaries`."""
    batch, heads, num_tokens, width = query.shape
    queries, keys, values = (x.transpose(1, 2).reshape(batch * num_tokens, -1, width) for x in (query, key, value))
    out = varlen_attn(
        queries,
        keys,
        values,
        boundaries,
        boundaries,
        num_tokens,  # no document is longer; the longest is not looked up
        num_tokens,
        window_size=(-1, 0),  # all that came before, nothing after
        enable_gqa=heads != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.view(batch, num_tokens, heads, width).transpose(1, 2)


def _boundaries(documents: Tensor) -> Tensor:
    """Where each document begins among all tokens of the batch, and the end: int32.

    Empty documents at the end fill it up to a power of two and one: a compiled layer sees few lengths.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.view(-1).nonzero().view(-1)
    length = 1 << (len(starts) - 1).bit_length()
    padded = torch.full((length + 1,), documents.numel(), dtype=torch.int32)
    padded[: len(starts)] = starts
    return padded
