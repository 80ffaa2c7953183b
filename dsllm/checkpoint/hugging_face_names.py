"""Where each of our parameters is stored in a Hugging Face model: names, transposed and fused matrices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsllm.config.model import ModelConfig
from dsllm.parameters import Parameter


@dataclass(frozen=True)
class Layout:
    """How a Hugging Face tensor is joined from our parameters, and split into them."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class HuggingFaceTensor:
    """One tensor of a Hugging Face model."""

    name: str
    parts: tuple[str, ...]
    """Names of dsllm's parameters that it contains."""
    layout: Layout


SAME = Layout(lambda parts: parts[0], lambda tensor: [tensor])
TRANSPOSED = Layout(lambda parts: parts[0].t(), lambda tensor: [tensor.t()])
"""GPT-2's Conv1D keeps its weights as [inputs, outputs]."""
STACKED = Layout(lambda parts: torch.cat(list(parts)), lambda tensor: tensor.chunk(3))
STACKED_TRANSPOSED = Layout(lambda parts: torch.cat(list(parts)).t(), lambda tensor: tensor.t().chunk(3))

IGNORED_SUFFIXES = (
    *("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    *(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),
)
"""Buffers in older files: frequencies, their sines and cosines, and causal masks. transformers computes them anew."""


OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}
"""What a tensor is called in memory by transformers 5, and in files that were not written by its `save_pretrained`."""


def real_shape(parameter: Parameter) -> tuple[int, ...]:
    """A parameter's shape in a Hugging Face model, which has no padding rows."""
    if parameter.padded_rows == 0:
        return parameter.shape
    return (parameter.shape[0] - parameter.padded_rows, *parameter.shape[1:])


def by_head(num_heads: int) -> Layout:
    """GPT-NeoX's fused matrix: the query, key and value rows of the first head, then those of the second, and so on."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([p.view(num_heads, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 2)

    def split(tensor: Tensor) -> Sequence[Tensor]:
        heads = tensor.view(num_heads, 3, -1, *tensor.shape[1:])
        return [heads[:, part].flatten(0, 1) for part in range(3)]

    return Layout(join, split)


def hugging_face_tensors(model_type: str, config: ModelConfig) -> list[HuggingFaceTensor]:
    """All tensors of a model as transformers names them, in its order; a tied head has no tensor."""
    rename = {"llama": _llama, "mistral": _llama, "qwen2": _llama, "gpt2": _gpt2, "gpt_neox": _neox}[model_type]
    return list(rename(config))


def base_prefix(model_type: str) -> str:
    """The prefix of all names except the head's; files of the bare model leave it out."""
    return {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(model_type, "model.")


def _plain(hub: str, own: str, bias: bool, weight_layout: Layout = SAME) -> Iterator[HuggingFaceTensor]:
    yield HuggingFaceTensor(f"{hub}.weight", (f"{own}.weight",), weight_layout)
    if bias:
        yield HuggingFaceTensor(f"{hub}.bias", (f"{own}.bias",), SAME)


def _fused(hub: str, own: str, bias: bool, weight_layout: Layout, bias_layout: Layout) -> Iterator[HuggingFaceTensor]:
    for kind, layout in [("weight", weight_layout), ("bias", bias_layout)][: 2 if bias else 1]:
        yield HuggingFaceTensor(f"{hub}.{kind}", tuple(f"{own}.{part}.{kind}" for part in "qkv"), layout)


def _llama(config: ModelConfig) -> Iterator[HuggingFaceTensor]:
    yield from _plain("model.embed_tokens", "embed", False)
    for layer in range(config.num_layers):
        hub, own = f"model.layers.{layer}", f"layers.{layer}"
        yield from _plain(f"{hub}.input_layernorm", f"{own}.attention_norm", False)
        for part in "qkv":
            yield from _plain(f"{hub}.self_attn.{part}_proj", f"{own}.attention.{part}", config.attention_bias)
        yield from _plain(f"{hub}.self_attn.o_proj", f"{own}.attention.output", config.attention_output_bias)
        yield from _plain(f"{hub}.post_attention_layernorm", f"{own}.mlp_norm", False)
        for part in ("gate", "up", "down"):
            yield from _plain(f"{hub}.mlp.{part}_proj", f"{own}.mlp.{part}", config.mlp_bias)
    yield from _plain("model.norm", "norm", False)
    if not config.tie_embeddings:
        yield from _plain("lm_head", "head", False)


def _gpt2(config: ModelConfig) -> Iterator[HuggingFaceTensor]:
    yield from _plain("transformer.wte", "embed", False)
    yield from _plain("transformer.wpe", "positions", False)
    for layer in range(config.num_layers):
        hub, own = f"transformer.h.{layer}", f"layers.{layer}"
        yield from _plain(f"{hub}.ln_1", f"{own}.attention_norm", True)
        yield from _fused(f"{hub}.attn.c_attn", f"{own}.attention", True, STACKED_TRANSPOSED, STACKED)
        yield from _plain(f"{hub}.attn.c_proj", f"{own}.attention.output", True, TRANSPOSED)
        yield from _plain(f"{hub}.ln_2", f"{own}.mlp_norm", True)
        yield from _plain(f"{hub}.mlp.c_fc", f"{own}.mlp.up", True, TRANSPOSED)
        yield from _plain(f"{hub}.mlp.c_proj", f"{own}.mlp.down", True, TRANSPOSED)
    yield from _plain("transformer.ln_f", "norm", True)
    if not config.tie_embeddings:
        yield from _plain("lm_head", "head", False)


def _neox(config: ModelConfig) -> Iterator[HuggingFaceTensor]:
    bias, heads = config.attention_bias, by_head(config.num_heads)
    yield from _plain("gpt_neox.embed_in", "embed", False)
    for layer in range(config.num_layers):
        hub, own = f"gpt_neox.layers.{layer}", f"layers.{layer}"
        yield from _plain(f"{hub}.input_layernorm", f"{own}.attention_norm", True)
        yield from _plain(f"{hub}.post_attention_layernorm", f"{own}.mlp_norm", True)
        yield from _fused(f"{hub}.attention.query_key_value", f"{own}.attention", bias, heads, heads)
        yield from _plain(f"{hub}.attention.dense", f"{own}.attention.output", bias)
        yield from _plain(f"{hub}.mlp.dense_h_to_4h", f"{own}.mlp.up", True)
        yield from _plain(f"{hub}.mlp.dense_4h_to_h", f"{own}.mlp.down", True)
    yield from _plain("gpt_neox.final_layer_norm", "norm", True)
    if not config.tie_embeddings:
        yield from _plain("embed_out", "head", False)
