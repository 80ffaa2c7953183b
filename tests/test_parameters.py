"""The table of parameters says of each one how it starts, whether it is decayed, and where it belongs."""

import dataclasses
import math

import pytest
from pydantic import TypeAdapter

from dsllm.config.model import ModelConfig
from dsllm.config.sizes import SIZES
from dsllm.parameters import Constant, Initial, Normal, parameter_table
from tests.helpers.models import BIASES, CONTEXT, LLAMA, SHAPES
from tests.helpers.sizes import PUBLISHED

EVERY: dict[str, tuple[ModelConfig, int]] = {name: (config, CONTEXT) for name, config in SHAPES.items()}
EVERY["qk-norm"] = dataclasses.replace(LLAMA, qk_norm=True), CONTEXT
EVERY["all-at-once"] = (
    dataclasses.replace(LLAMA, qk_norm=True, norm="layernorm", positions="learned", head_size=20, **BIASES),
    CONTEXT,
)
EVERY |= {
    name: (TypeAdapter(ModelConfig).validate_python(size | {"vocab_size": PUBLISHED[name][0]}), PUBLISHED[name][1])
    for name, size in SIZES.items()
}
"""Config and context length of every shape and every named size."""


def initial_by_name(name: str, config: ModelConfig) -> tuple[Initial, int]:
    """How a parameter starts, judged by its name: an independent judge of the table."""
    if name.endswith(".bias"):
        return Constant(0.0), 0
    if "norm" in name:
        return Constant(1.0), 0
    std = config.initial_std
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    padded = config.padded_vocab_size - config.vocab_size if name in ("embed.weight", "head.weight") else 0
    return Normal(std), padded


@pytest.mark.parametrize("name", EVERY)
def test_initial_values_and_decay_follow_from_what_a_parameter_is(name: str):
    config, context_length = EVERY[name]
    for parameter in parameter_table(config, context_length):
        assert (parameter.initial, parameter.padded_rows) == initial_by_name(parameter.name, config), parameter.name
        # matrices are decayed, norms and biases are not
        assert parameter.weight_decay_factor == (1.0 if len(parameter.shape) == 2 else 0.0), parameter.name


@pytest.mark.parametrize("name", EVERY)
def test_part_and_layer_are_where_the_model_has_the_parameter(name: str):
    config, context_length = EVERY[name]
    parts = {"embed": "embedding", "positions": "positions", "norm": "norm", "head": "head"}
    for parameter in parameter_table(config, context_length):
        path = parameter.name.split(".")
        if path[0] == "layers":
            assert parameter.layer == ".".join(path[:2])
            assert parameter.part == ("norm" if "norm" in parameter.name else path[2])
        else:
            assert parameter.layer == path[0]
            assert parameter.part == parts[path[0]]


def test_padding_rows_are_elements_but_not_real_ones():
    embedding = parameter_table(LLAMA, CONTEXT)[0]
    assert (embedding.shape, embedding.padded_rows) == ((256, 48), 56)
    assert (embedding.num_elements, embedding.num_real_elements) == (256 * 48, 200 * 48)


def test_the_vocabulary_must_be_resolved():
    with pytest.raises(AssertionError, match="vocab_size is resolved"):
        parameter_table(dataclasses.replace(LLAMA, vocab_size=None), CONTEXT)
