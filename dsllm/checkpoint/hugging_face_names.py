"""Where each of our parameters lies in a Hugging Face model: names, transposed and fused matrices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsllm.config.model import ModelConfig


@dataclass(frozen=True)
class Layout:
    """How one of their tensors is made of ours, and how it comes apart."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class TheirTensor:
    """One tensor of a Hugging Face model."""

    name: str
    parts: tuple[str, ...]
    """Our parameters in it."""
    layout: Layout


SAME = Layout(lambda parts: parts[0], lambda tensor: [tensor])
TRANSPOSED = Layout(lambda parts: parts[0].t(), lambda tensor: [tensor.t()])
"""GPT-2's Conv1D keeps its weights as [inputs, outputs]."""
STACKED = Layout(lambda parts: torch.cat(list(parts)), lambda tensor: tensor.chunk(3))
STACKED_TRANSPOSED = Layout(lambda parts: torch.cat(list(parts)).t(), lambda tensor: tensor.t().chunk(3))

IGNORED_SUFFIXES = (
    *(".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"),
    *(".attention.bias", ".attention.masked_bias"),
)
"""Buffers that older files carry: frequencies and causal masks."""


def by_head(num_heads: int) -> Layout:
    """GPT-NeoX's fused matrix: the query, key and value rows of the first head, then those of the second, and so on."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([p.view(num_heads, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 2)

    def split(tensor: Tensor) -> Sequence[Tensor]:
        heads = tensor.view(num_heads, 3, -1, *tensor.shape[1:])
        return [heads[:, part].flatten(0, 1) for part in range(3)]

    return Layout(join, split)


def their_tensors(model_type: str, config: ModelConfig) -> list[TheirTensor]:
    """All tensors of a model as transformers names them, in its order; a tied head has none of its own."""
    rename = {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _neox}[model_type]
    return list(rename(config))


def base_prefix(model_type: str) -> str:
    """What stands before the names of all tensors but the head's; files of the bare model leave it out."""
    return {"llama": "model.", "gpt2": "transformer.", "gpt_neox": "gpt_neox."}[model_type]


def _plain(theirs: str, ours: str, bias: bool, weight_layout: Layout = SAME) -> Iterator[TheirTensor]:
    yield TheirTensor(f"{theirs}.weight", (f"{ours}.weight",), weight_layout)
    if bias:
        yield TheirTensor(f"{theirs}.bias", (f"{ours}.bias",), SAME)


def _fused(theirs: str, ours: str, bias: bool, weight_layout: Layout, bias_layout: Layout) -> Iterator[TheirTensor]:
    for kind, layout in [("weight", weight_layout), ("bias", bias_layout)][: 2 if bias else 1]:
        yield TheirTensor(f"{theirs}.{kind}", tuple(f"{ours}.{part}.{kind}" for part in "qkv"), layout)


def _llama(config: ModelConfig) -> Iterator[TheirTensor]:
    yield from _plain("model.embed_tokens", "embed", False)
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        yield from _plain(f"{theirs}.input_layernorm", f"{ours}.attention_norm", False)
        for part in "qkv":
            yield from _plain(f"{theirs}.self_attn.{part}_proj", f"{ours}.attention.{part}", config.attention_bias)
        yield from _plain(f"{theirs}.self_attn.o_proj", f"{ours}.attention.output", config.attention_output_bias)
        yield from _plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", False)
        for part in ("gate", "up", "down"):
            yield from _plain(f"{theirs}.mlp.{part}_proj", f"{ours}.mlp.{part}", config.mlp_bias)
    yield from _plain("model.norm", "norm", False)
    if not config.tie_embeddings:
        yield from _plain("lm_head", "head", False)


def _gpt2(config: ModelConfig) -> Iterator[TheirTensor]:
    yield from _plain("transformer.wte", "embed", False)
    yield from _plain("transformer.wpe", "positions", False)
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        yield from _plain(f"{theirs}.ln_1", f"{ours}.attention_norm", True)
        yield from _fused(f"{theirs}.attn.c_attn", f"{ours}.attention", True, STACKED_TRANSPOSED, STACKED)
        yield from _plain(f"{theirs}.attn.c_proj", f"{ours}.attention.output", True, TRANSPOSED)
        yield from _plain(f"{theirs}.ln_2", f"{ours}.mlp_norm", True)
        yield from _plain(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up", True, TRANSPOSED)
        yield from _plain(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down", True, TRANSPOSED)
    yield from _plain("transformer.ln_f", "norm", True)
    if not config.tie_embeddings:
        yield from _plain("lm_head", "head", False)


def _neox(config: ModelConfig) -> Iterator[TheirTensor]:
    bias, heads = config.attention_bias, by_head(config.num_heads)
    yield from _plain("gpt_neox.embed_in", "embed", False)
    for layer in range(config.num_layers):
        theirs, ours = f"gpt_neox.layers.{layer}", f"layers.{layer}"
        yield from _plain(f"{theirs}.input_layernorm", f"{ours}.attention_norm", True)
        yield from _plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", True)
        yield from _fused(f"{theirs}.attention.query_key_value", f"{ours}.attention", bias, heads, heads)
        yield from _plain(f"{theirs}.attention.dense", f"{ours}.attention.output", bias)
        yield from _plain(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.up", True)
        yield from _plain(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.down", True)
    yield from _plain("gpt_neox.final_layer_norm", "norm", True)
    if not config.tie_embeddings:
        yield from _plain("embed_out", "head", False)
