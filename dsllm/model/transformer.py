"""The decoder-only transformer, top to bottom: norm, rotary positions, attention, MLP, block, model.

- RMSNorm or LayerNorm before each branch; rotary (with Llama-3 scaling) or learned positions
- multi-head or grouped-query attention, optionally with RMSNorm on queries and keys
- SwiGLU or GELU; branches one after the other, or in parallel (GPT-NeoX); biases where the config sets them
- the head is part of forward: with targets it returns per-token losses, and full fp32 logits never exist

Parameters are created uninitialised; model/initial.py fills them. Linear layers, embeddings and norms are subclasses of
torch's, so that tools for tensor parallelism, adapters or quantisation recognise them.
"""

# B sequences, T tokens, d hidden size, H query heads, K key and value heads, D width of a head, V padded vocabulary.

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsllm.config.model import ModelConfig
from dsllm.model.attention import Attend, cached_attention, causal_attention, document_attention
from dsllm.model.kernels import TORCH, Kernels
from dsllm.model.linear import linear
from dsllm.model.loss import token_losses
from dsllm.model.norm import layer_norm
from dsllm.model.recompute import KEEP_ALL, Recompute
from dsllm.model.rotary import RotaryTable, rotate
from dsllm.objectives import ModelOutput


class Linear(nn.Linear):
    """torch's linear layer with our `linear` as its product, so that tools that look for an nn.Linear find one."""

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialised."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """x / root mean square(x) * weight."""

    def __init__(self, width: int, epsilon: float, kernels: Kernels):
        super().__init__(width, epsilon)
        self.epsilon = epsilon
        self.kernel = kernels.rms_norm

    def reset_parameters(self) -> None:
        """Leave the weight uninitialised."""

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.epsilon)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation * weight + bias."""

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialised."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def build_norm(config: ModelConfig, kernels: Kernels) -> nn.Module:
    """The norm over the residual stream."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.norm_epsilon)
    return RMSNorm(config.hidden_size, config.norm_epsilon, kernels)


class KeyValueCache:
    """Keys and values of the tokens so far, per layer, for generation."""

    def __init__(self, num_layers: int):
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""
        first = self.layers[0]
        return 0 if first is None else first[0].shape[2]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, S, D] of new tokens; returns those of all tokens, [B, K, T, D]."""
        seen = self.layers[layer]
        if seen is not None:
            key, value = torch.cat((seen[0], key), 2), torch.cat((seen[1], value), 2)
        self.layers[layer] = (key, value)
        return key, value


class Attention(nn.Module):
    """Causal self-attention, multi-head or grouped-query (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.layer = layer
        self.head_width = config.head_width
        self.dropout = config.dropout
        queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q = Linear(config.hidden_size, queries, config.attention_bias)
        self.k = Linear(config.hidden_size, keys, config.attention_bias)
        self.v = Linear(config.hidden_size, keys, config.attention_bias)
        self.output = Linear(queries, config.hidden_size, config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_width, config.norm_epsilon, kernels) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_width, config.norm_epsilon, kernels) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend, cache: KeyValueCache | None
    ) -> Tensor:
        batch, num_tokens, _ = x.shape
        query = self.q_norm(self.q(x).view(batch, num_tokens, -1, self.head_width))  # [B, T, H, D]
        key = self.k_norm(self.k(x).view(batch, num_tokens, -1, self.head_width))  # [B, T, K, D]
        value = self.v(x).view(batch, num_tokens, -1, self.head_width).transpose(1, 2)  # [B, K, T, D]
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)  # [B, H, T, D], [B, K, T, D]
        else:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        if cache is None:
            mixed = attend(query, key, value, self.dropout if self.training else 0.0)
        else:
            mixed = cached_attention(query, *cache.extend(self.layer, key, value))
        return self.output(mixed.transpose(1, 2).reshape(batch, num_tokens, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), or two matrices with GELU between them."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kind = config.mlp
        self.swiglu = kernels.swiglu
        if config.mlp == "swiglu":
            self.gate = Linear(config.hidden_size, config.mlp_width, config.mlp_bias)
        self.up = Linear(config.hidden_size, config.mlp_width, config.mlp_bias)
        self.down = Linear(config.mlp_width, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(self.swiglu(self.gate(x), self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Block(nn.Module):
    """One decoder layer: attention and MLP, each applied to the normed residual stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int, recompute: Recompute, kernels: Kernels):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.dropout = config.dropout
        self.recompute = recompute
        self.attention_norm = build_norm(config, kernels)
        self.attention = Attention(config, layer, kernels)
        self.mlp_norm = build_norm(config, kernels)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend, cache: KeyValueCache | None
    ) -> Tensor:
        def attention_branch(x: Tensor) -> Tensor:
            return self._drop(self.attention(self.attention_norm(x), rotary, attend, cache))

        def mlp_branch(x: Tensor) -> Tensor:
            return self._drop(self.mlp(self.mlp_norm(x)))

        if self.training and self.recompute.covers("attention"):
            mixed = x + self.recompute.apply(attention_branch, x, self.dropout > 0)
        else:
            mixed = x + attention_branch(x)
        mlp_input = x if self.parallel_residual else mixed
        if self.training and self.recompute.covers("mlp"):
            return mixed + self.recompute.apply(mlp_branch, mlp_input, self.dropout > 0)
        return mixed + mlp_branch(mlp_input)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Embedding(nn.Embedding):
    """One learned vector per token id or position."""

    def reset_parameters(self) -> None:
        """Leave the weight uninitialised."""


class Head(nn.Linear):
    """Hidden states to logits over the vocabulary, or straight to losses."""

    def __init__(self, config: ModelConfig, tied_weight: Tensor | None):
        assert config.vocab_size is not None, "vocab_size is resolved from the tokenizer before a model is built"
        device = None if tied_weight is None else "meta"  # a weight that is replaced at once takes no memory
        super().__init__(config.hidden_size, config.padded_vocab_size, bias=False, device=device)
        self.vocab_size = config.vocab_size
        if tied_weight is not None:
            # Registered here too, so that ZeRO-3, which gathers parameters per module, finds it. named_parameters()
            # lists it once, as embed.weight.
            self.weight = tied_weight

    def reset_parameters(self) -> None:
        """Leave the weight uninitialised."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return linear(x, self.weight)[..., : self.vocab_size]
        return token_losses(x, self.weight, targets, self.vocab_size)


class Transformer(nn.Module):
    """The whole decoder.

    Args:
        config: its shape; vocab_size must be resolved
        context_length: positions it is made for (rows of learned positions)
        compute_dtype: dtype of the residual stream and of all matrix products; None (default): that of the parameters
        recompute: what the backward pass computes again instead of keeping it
        kernels: of the norms and of SwiGLU
    """

    def __init__(
        self,
        config: ModelConfig,
        context_length: int,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = KEEP_ALL,
        kernels: Kernels = TORCH,
    ):
        super().__init__()
        self.config = config
        self.context_length = context_length
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        self.embed = Embedding(config.padded_vocab_size, config.hidden_size)
        self.positions = Embedding(context_length, config.hidden_size) if config.positions == "learned" else None
        self.rotary = RotaryTable(config) if config.positions == "rope" else None
        self.layers = nn.ModuleList(Block(config, layer, recompute, kernels) for layer in range(config.num_layers))
        self.norm = build_norm(config, kernels)
        self.head = Head(config, self.embed.weight if config.tie_embeddings else None)

    def compile_layers(self) -> None:
        """Let torch compile each block when it first runs, for fixed shapes. Names of modules and parameters stay."""
        for block in self.layers:
            block.compile(dynamic=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> ModelOutput | Tensor:
        """Per-token losses, or logits.

        Args:
            tokens: [B, T] token ids
            targets: [B, T] the ids to predict
            cache: keys and values of the tokens before these; these are added to it
            documents: [B, T] the number of each token's document in its sequence, rising, on the CPU: tokens attend to
                their own document only
            positions: [B, T] the position of each token, below context_length, on the CPU; None (default): they
                continue from the cache's last token, or start at 0, across documents
        Returns:
            with targets the cross-entropy of each, fp32 [B, T]; without, logits [B, T, vocab_size]
        """
        assert cache is None or documents is None, "a cache holds a single document"
        start = 0 if cache is None else cache.num_tokens
        stop = start + tokens.shape[1] if positions is None else int(positions.max()) + 1
        assert stop <= self.context_length, f"{stop} positions do not fit the model's context of {self.context_length}"
        if positions is not None:
            positions = positions.to(tokens.device, non_blocking=True)
        x = self.embed(tokens)  # [B, T, d]
        if self.positions is not None:
            x = x + self.positions(torch.arange(start, stop, device=tokens.device) if positions is None else positions)
        x = x.to(self.compute_dtype or x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        rotary = None if self.rotary is None else self.rotary.at(start, stop, x, positions)
        attend: Attend = causal_attention
        if documents is not None:
            attend = document_attention(documents, x.device, x.dtype, self.config.dropout if self.training else 0.0)
        for layer, block in enumerate(self.layers):
            if self.training and self.recompute.covers_block(layer):
                run = partial(block, rotary=rotary, attend=attend, cache=cache)
                x = self.recompute.apply(run, x, self.config.dropout > 0)
            else:
                x = block(x, rotary, attend, cache)
        if targets is None:
            return self.head(self.norm(x))
        return ModelOutput(losses=self.head(self.norm(x), targets), auxiliary={})
