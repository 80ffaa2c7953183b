"""One row per parameter of a model: the table behind initial values, optimizer groups, counts, names and slices.

Torch-free: the model builds its modules from the same config, and `model.table.check_table` compares the two.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsllm.config.model import ModelConfig

Role = Literal["matrix", "embedding", "head", "norm", "bias", "router", "adapter"]
"""What a parameter does. matrix: the weight of a linear layer inside a block; embedding: a row per token id or position;
head: the output projection, where it has weights of its own; norm: the weight of a norm."""

Part = Literal["embedding", "positions", "attention", "mlp", "norm", "head"]
"""The part of the model that a parameter is counted under."""


@dataclass(frozen=True, slots=True)
class Normal:
    """Independent normal values with mean 0."""

    std: float


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value everywhere."""

    value: float


Initial = Normal | Constant
"""How a parameter starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter, described the same way for every layout it may be trained in."""

    name: str
    """Global name, as `named_parameters()` of the whole model gives it."""
    shape: tuple[int, ...]
    """Global shape, before ZeRO or tensor parallelism divide it."""
    role: Role
    part: Part
    layer: str
    """The block (`layers.3`) or the direct part of the model (`embed`, `norm`, `head`) that contains it."""
    initial: Initial
    padded_rows: int = 0
    """Rows at the end of the shape that belong to no token: they start at 0, are masked in the loss and not exported."""
    weight_decay_factor: float = 1.0
    """Multiplies the optimizer's weight decay; 0 for norms and biases."""
    learning_rate_factor: float = 1.0
    """Multiplies the learning rate of every step."""
    tensor_axis: int | None = None
    """Axis that is divided over tensor-parallel ranks; None (default): every rank has the whole parameter."""
    expert: int | None = None
    """Global number of its expert; None (default): every token uses the parameter."""
    trainable: bool = True
    """False: a frozen weight without optimizer state."""

    @property
    def num_elements(self) -> int:
        """Elements, padding included."""
        return math.prod(self.shape)

    @property
    def num_real_elements(self) -> int:
        """Elements without the padding rows."""
        return self.num_elements - self.padded_rows * math.prod(self.shape[1:])


ParameterTable = tuple[Parameter, ...]
"""All parameters of a model, in the order of its `named_parameters()`."""


def parameter_table(config: ModelConfig, context_length: int) -> ParameterTable:
    """The parameters of a model.

    Matrices start normal with `initial_std`; the two projections that write into the residual stream are scaled by
    1 / sqrt(2 x num_layers) (GPT-2: Radford et al. 2019, section 2.3). Norm weights start at one, biases at zero.

    Args:
        config: with its vocabulary resolved
        context_length: in tokens; decides the learned positions
    """
    assert config.vocab_size is not None, "vocab_size is resolved from the tokenizer before a model is built"
    return tuple(_parameters(config, context_length))


def _parameters(config: ModelConfig, context_length: int) -> Iterator[Parameter]:
    vocabulary = (config.padded_vocab_size, config.hidden_size)
    padded_rows = config.padded_vocab_size - (config.vocab_size or 0)
    normal = Normal(config.initial_std)
    yield Parameter(
        name="embed.weight", shape=vocabulary, role="embedding", part="embedding", layer="embed", initial=normal,
        padded_rows=padded_rows, tensor_axis=0,
    )  # fmt: skip
    if config.positions == "learned":
        yield Parameter(
            name="positions.weight", shape=(context_length, config.hidden_size), role="embedding", part="positions",
            layer="positions", initial=normal,
        )  # fmt: skip
    for layer in range(config.num_layers):
        yield from _block(config, f"layers.{layer}")
    yield from _norm("norm", "norm", config.hidden_size, with_bias=config.norm == "layernorm")
    if not config.tie_embeddings:
        yield Parameter(
            name="head.weight", shape=vocabulary, role="head", part="head", layer="head", initial=normal,
            padded_rows=padded_rows, tensor_axis=0,
        )  # fmt: skip


def _block(config: ModelConfig, layer: str) -> Iterator[Parameter]:
    """One decoder block, in the order in which its modules are built."""
    width, with_bias = config.hidden_size, config.norm == "layernorm"
    yield from _norm(f"{layer}.attention_norm", layer, width, with_bias)
    yield from _attention(config, layer)
    yield from _norm(f"{layer}.mlp_norm", layer, width, with_bias)
    yield from _mlp(config, layer)


def _attention(config: ModelConfig, layer: str) -> Iterator[Parameter]:
    """Queries, keys and values, split by heads among tensor-parallel ranks, and the output projection."""
    width, name = config.hidden_size, f"{layer}.attention"
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    for projection, outputs in (("q", queries), ("k", keys), ("v", keys)):
        weight = Parameter(
            name=f"{name}.{projection}.weight", shape=(outputs, width), role="matrix", part="attention", layer=layer,
            initial=Normal(config.initial_std), tensor_axis=0,
        )  # fmt: skip
        yield from _linear(weight, config.attention_bias)
    weight = Parameter(
        name=f"{name}.output.weight", shape=(width, queries), role="matrix", part="attention", layer=layer,
        initial=_into_the_residual_stream(config), tensor_axis=1,
    )  # fmt: skip
    yield from _linear(weight, config.attention_output_bias)
    if config.qk_norm:
        yield from _norm(f"{name}.q_norm", layer, config.head_width, with_bias=False)
        yield from _norm(f"{name}.k_norm", layer, config.head_width, with_bias=False)


def _mlp(config: ModelConfig, layer: str) -> Iterator[Parameter]:
    """The projections into the MLP, of which each tensor-parallel rank has some columns, and the projection back."""
    width, inner, name = config.hidden_size, config.mlp_width, f"{layer}.mlp"
    for projection in ("gate", "up") if config.mlp == "swiglu" else ("up",):
        weight = Parameter(
            name=f"{name}.{projection}.weight", shape=(inner, width), role="matrix", part="mlp", layer=layer,
            initial=Normal(config.initial_std), tensor_axis=0,
        )  # fmt: skip
        yield from _linear(weight, config.mlp_bias)
    weight = Parameter(
        name=f"{name}.down.weight", shape=(width, inner), role="matrix", part="mlp", layer=layer,
        initial=_into_the_residual_stream(config), tensor_axis=1,
    )  # fmt: skip
    yield from _linear(weight, config.mlp_bias)


def _into_the_residual_stream(config: ModelConfig) -> Normal:
    """The start of a projection whose output is added to the residual stream, 2 x num_layers times in all."""
    return Normal(config.initial_std / math.sqrt(2 * config.num_layers))


def _linear(weight: Parameter, with_bias: bool) -> Iterator[Parameter]:
    """The weight [outputs, inputs] of a linear layer and, if it has one, its bias [outputs]."""
    yield weight
    if with_bias:
        yield Parameter(
            name=f"{weight.name.removesuffix('.weight')}.bias", shape=weight.shape[:1], role="bias", part=weight.part,
            layer=weight.layer, initial=Constant(0.0), weight_decay_factor=0.0,
            tensor_axis=0 if weight.tensor_axis == 0 else None,  # where the inputs are cut, every rank has the whole bias
        )  # fmt: skip


def _norm(name: str, layer: str, width: int, with_bias: bool) -> Iterator[Parameter]:
    """The weight of a norm and, if it has one, its bias."""
    yield Parameter(
        name=f"{name}.weight", shape=(width,), role="norm", part="norm", layer=layer, initial=Constant(1.0),
        weight_decay_factor=0.0,
    )  # fmt: skip
    if with_bias:
        yield Parameter(
            name=f"{name}.bias", shape=(width,), role="bias", part="norm", layer=layer, initial=Constant(0.0),
            weight_decay_factor=0.0,
        )  # fmt: skip
