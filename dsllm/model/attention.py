"""Causal attention: which kernel runs where, and a fast one for CPUs."""

# B sequences, H query heads, K key and value heads (H a multiple of K), T tokens, D width of a head.

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_TOKENS = 128
"""Queries per block: smaller blocks waste less on the masked triangle, larger ones make larger matrix products."""

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
    short = query.shape[2] <= BLOCK_CAUSAL_TOKENS
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and short and dropout == 0.0:
        return block_causal_attention(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


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


def block_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention from batched matrix products: blocks of queries, each over its causal prefix of keys.

    The softmax is computed in fp32 inside torch's kernel whatever the dtype. Shapes as in `causal_attention`.
    """
    return _BlockCausal.apply(query, key, value)


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, num_tokens, width = query.shape
        query, key, value = query * width**-0.5, key.contiguous(), value.contiguous()
        out = query.new_empty(batch, num_tokens, heads, width).transpose(1, 2)  # as the output projection wants it
        all_weights = []
        for start, stop in _blocks(num_tokens):
            weights = _attention_weights(query, key, start, stop)
            all_weights.append(weights)
            mixed = weights @ _flat(value)[:, :stop]  # [B K, H/K (stop - start), D]
            out[:, :, start:stop] = mixed.view(batch, heads, stop - start, width)
        ctx.save_for_backward(query, key, value, *all_weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *all_weights = ctx.saved_tensors  # the query scaled
        batch, heads, num_tokens, width = query.shape
        num_kv_heads = key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for weights, (start, stop) in zip(all_weights, _blocks(num_tokens), strict=True):
            grad_mixed = _query_block(grad, num_kv_heads, start, stop)
            _flat(grad_value)[:, :stop].baddbmm_(weights.transpose(1, 2), grad_mixed)
            grad_weights = grad_mixed @ _flat(value)[:, :stop].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _flat(grad_key)[:, :stop].baddbmm_(
                grad_scores.transpose(1, 2), _query_block(query, num_kv_heads, start, stop)
            )
            grad_block = grad_scores @ _flat(key)[:, :stop]
            grad_query[:, :, start:stop] = grad_block.view(batch, heads, stop - start, width)
        return grad_query.mul_(width**-0.5), grad_key, grad_value


def _blocks(num_tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_TOKENS, num_tokens)) for start in range(0, num_tokens, BLOCK_TOKENS)]


def _flat(x: Tensor) -> Tensor:
    """[B, K, T, D] -> [B K, T, D]"""
    return x.view(-1, *x.shape[2:])


def _query_block(query: Tensor, num_kv_heads: int, start: int, stop: int) -> Tensor:
    """Rows start:stop of the query heads, those that share a key head under each other: [B K, H/K (stop - start), D]"""
    batch, _, _, width = query.shape
    return query[:, :, start:stop].reshape(batch * num_kv_heads, -1, width)


def _attention_weights(query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    """Softmax of the scores of the scaled queries start:stop over keys :stop -> [B K, H/K (stop - start), stop]"""
    scores = _query_block(query, key.shape[1], start, stop) @ _flat(key)[:, :stop].transpose(1, 2)
    size = stop - start
    future = torch.full((size, size), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
    scores.view(scores.shape[0], -1, size, stop)[..., start:].add_(future)
    return torch.softmax(scores, -1)
