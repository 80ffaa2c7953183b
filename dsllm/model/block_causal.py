"""Causal attention for CPUs by batched matrix products: a block of queries at a time, over the keys it can see."""

# B sequences, H query heads, K key and value heads (H a multiple of K), T tokens, D width of a head.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_TOKENS = 128
"""Queries per block: smaller blocks waste less on the masked triangle, larger ones make larger matrix products."""


@dataclass(frozen=True)
class QueryBlock:
    """The queries [start, stop) and the keys [first, stop), with a mask over the last keys."""

    start: int
    stop: int
    first: int
    hidden: Tensor
    """Added to the scores of the last keys, [B or 1, 1, stop - start, keys]: -inf where a query must not see a key, else 0."""


def block_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[QueryBlock] | None = None
) -> Tensor:
    """Causal attention. The softmax is computed in fp32 inside torch's kernel whatever the dtype.

    Args:
        query: [B, H, T, D]
        key, value: [B, K, T, D]
        blocks: from `document_blocks`; None (default): each token sees all tokens before it
    Returns:
        [B, H, T, D]
    """
    if blocks is None:
        blocks = [
            QueryBlock(start, stop, 0, _future(stop - start, query.dtype)) for start, stop in _cuts(query.shape[2])
        ]
    return _BlockCausal.apply(query, key, value, blocks)


def document_blocks(documents: Tensor, dtype: torch.dtype) -> list[QueryBlock]:
    """Blocks in which a token sees its own document only.

    A block's keys start where the earliest of the documents at its first query starts.

    Args:
        documents: [B, T] the number of each token's document in its sequence, rising
        dtype: that of the queries
    """
    blocks = []
    for start, stop in _cuts(documents.shape[1]):
        first = int((documents < documents[:, start : start + 1]).sum(1).min())
        other = documents[:, None, start:stop, None] != documents[:, None, None, first:stop]  # [B, 1, queries, keys]
        hidden = torch.zeros(other.shape, dtype=dtype).masked_fill_(other, float("-inf"))
        hidden[..., start - first :] += _future(stop - start, dtype)
        blocks.append(QueryBlock(start, stop, first, hidden))
    return blocks


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[QueryBlock]) -> Tensor:
        batch, heads, num_tokens, width = query.shape
        query, key, value = query * width**-0.5, key.contiguous(), value.contiguous()
        out = query.new_empty(batch, num_tokens, heads, width).transpose(
            1, 2
        )  # the output projection reads it token by token
        all_weights = []
        for block in blocks:
            weights = _attention_weights(query, key, block)
            all_weights.append(weights)
            mixed = weights @ _flat(value)[:, block.first : block.stop]  # [B K, H/K (stop - start), D]
            out[:, :, block.start : block.stop] = mixed.view(batch, heads, -1, width)
        ctx.blocks = blocks
        ctx.save_for_backward(query, key, value, *all_weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *all_weights = ctx.saved_tensors  # the query is scaled already
        batch, heads, _, width = query.shape
        num_kv_heads = key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for weights, block in zip(all_weights, ctx.blocks, strict=True):
            keys = slice(block.first, block.stop)
            grad_mixed = _query_block(grad, num_kv_heads, block)
            _flat(grad_value)[:, keys].baddbmm_(weights.transpose(1, 2), grad_mixed)
            grad_weights = grad_mixed @ _flat(value)[:, keys].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _flat(grad_key)[:, keys].baddbmm_(grad_scores.transpose(1, 2), _query_block(query, num_kv_heads, block))
            grad_block = grad_scores @ _flat(key)[:, keys]
            grad_query[:, :, block.start : block.stop] = grad_block.view(batch, heads, -1, width)
        return grad_query.mul_(width**-0.5), grad_key, grad_value, None


def _cuts(num_tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_TOKENS, num_tokens)) for start in range(0, num_tokens, BLOCK_TOKENS)]


def _flat(x: Tensor) -> Tensor:
    """[B, K, T, D] -> [B K, T, D]"""
    return x.view(-1, *x.shape[2:])


def _future(size: int, dtype: torch.dtype) -> Tensor:
    """[1, 1, size, size]: -inf where the key comes after the query."""
    return torch.full((1, 1, size, size), float("-inf"), dtype=dtype).triu_(1)


def _query_block(query: Tensor, num_kv_heads: int, block: QueryBlock) -> Tensor:
    """A block's queries; heads that share a key head are stacked: [B K, H/K (stop - start), D]"""
    batch, _, _, width = query.shape
    return query[:, :, block.start : block.stop].reshape(batch * num_kv_heads, -1, width)


def _attention_weights(query: Tensor, key: Tensor, block: QueryBlock) -> Tensor:
    """Softmax of the scaled queries' scores over the block's keys -> [B K, H/K (stop - start), stop - first]"""
    keys = _flat(key)[:, block.first : block.stop]
    scores = _query_block(query, key.shape[1], block) @ keys.transpose(1, 2)
    every_head = scores.view(query.shape[0], -1, block.stop - block.start, block.stop - block.first)
    every_head[..., -block.hidden.shape[-1] :].add_(block.hidden)
    return torch.softmax(scores, -1)
