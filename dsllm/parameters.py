"""One row per parameter of a model: the table that initial values, optimizer groups, counts, names and slices read.

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
    """Everything about one parameter that does not depend on the layout it is trained in."""

    name: str
    """Global name, as `named_parameters()` of the whole model gives it."""
    shape: tuple[int, ...]
    """Global shape: never that of a tensor-parallel or ZeRO shard."""
    role: Role
    part: Part
    layer: str
    """The block (`layers.3`) or the direct part of the model (`embed`, `norm`, `head`) that contains it."""
    initial: Initial
    padded_rows: int = 0
    """Last rows of the shape that stand for no token: they start at 0, take no part in the loss and are not exported."""
    weight_decay_factor: float = 1.0
    """Multiplies the optimizer's weight decay; 0 for norms and biases."""
    learning_rate_factor: float = 1.0
    """Multiplies the learning rate of every step."""
    tensor_axis: int | None = None
    """Axis that tensor-parallel ranks cut; None: every rank has the whole parameter."""
    expert: int | None = None
    """Global number of the expert it belongs to; None: it is not part of an expert."""
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
    yield from _norm("norm", "norm", config.hidden_size, bias=config.norm == "layernorm")
    if not config.tie_embeddings:
        yield Parameter(
            name="head.weight", shape=vocabulary, role="head", part="head", layer="head", initial=normal,
            padded_rows=padded_rows, tensor_axis=0,
        )  # fmt: skip


def _block(config: ModelConfig, layer: str) -> Iterator[Parameter]:
    """One decoder block. Projections into heads and into the MLP are cut by outputs, those back by inputs."""
    width, bias = config.hidden_size, config.norm == "layernorm"
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    into, out_of = Normal(config.initial_std), Normal(config.initial_std / math.sqrt(2 * config.num_layers))
    yield from _norm(f"{layer}.attention_norm", layer, width, bias)
    for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
        yield from _linear(f"{layer}.attention.{name}", layer, (outputs, width), into, config.attention_bias, 0)
    yield from _linear(f"{layer}.attention.output", layer, (width, queries), out_of, config.attention_output_bias, 1)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield from _norm(f"{layer}.attention.{name}", layer, config.head_width, bias=False)
    yield from _norm(f"{layer}.mlp_norm", layer, width, bias)
    for name in ("gate", "up") if config.mlp == "swiglu" else ("up",):
        yield from _linear(f"{layer}.mlp.{name}", layer, (config.mlp_width, width), into, config.mlp_bias, 0)
    yield from _linear(f"{layer}.mlp.down", layer, (width, config.mlp_width), out_of, config.mlp_bias, 1)


def _norm(name: str, layer: str, width: int, bias: bool) -> Iterator[Parameter]:
    for kind, initial in (("weight", Constant(1.0)), ("bias", Constant(0.0)))[: 2 if bias else 1]:
        yield Parameter(
            name=f"{name}.{kind}", shape=(width,), role="norm" if kind == "weight" else "bias", part="norm", layer=layer,
            initial=initial, weight_decay_factor=0.0,
        )  # fmt: skip


def _linear(
    name: str, layer: str, shape: tuple[int, int], initial: Normal, bias: bool, tensor_axis: int
) -> Iterator[Parameter]:
    """A weight [outputs, inputs] and perhaps a bias [outputs], which is whole where the inputs are cut."""
    part: Part = "attention" if ".attention." in name else "mlp"
    yield Parameter(
        name=f"{name}.weight", shape=shape, role="matrix", part=part, layer=layer, initial=initial,
        tensor_axis=tensor_axis,
    )  # fmt: skip
    if bias:
        yield Parameter(
            name=f"{name}.bias", shape=shape[:1], role="bias", part=part, layer=layer, initial=Constant(0.0),
            weight_decay_factor=0.0, tensor_axis=0 if tensor_axis == 0 else None,
        )  # fmt: skip
