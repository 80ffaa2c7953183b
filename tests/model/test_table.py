"""The table of parameters is the built model's: names, order and shapes, for every shape and size; initial values too."""

import dataclasses
import math

import pytest
import torch
from pydantic import TypeAdapter

from dsllm.config.model import ModelConfig
from dsllm.config.sizes import SIZES
from dsllm.model.table import check_table
from dsllm.model.transformer import Transformer
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


def on_meta(config: ModelConfig, context_length: int) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, context_length)


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
def test_the_table_is_the_model(name: str):
    config, context_length = EVERY[name]
    table = parameter_table(config, context_length)
    found = [(name, tuple(p.shape)) for name, p in on_meta(config, context_length).named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in table] == found
    check_table(on_meta(config, context_length), table)


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


def test_what_differs_is_named():
    table = parameter_table(LLAMA, CONTEXT)
    model = on_meta(LLAMA, CONTEXT)
    with pytest.raises(AssertionError, match=r"head\.weight is in the model but not in the table$"):
        check_table(model, table[:-1])
    with pytest.raises(AssertionError, match=r"differ: positions\.weight is in the table but not in the model$"):
        check_table(model, (*table, dataclasses.replace(table[0], name="positions.weight")))
    wider = (dataclasses.replace(table[0], shape=(384, 48)), *table[1:])
    with pytest.raises(
        AssertionError, match=r"embed\.weight is \[256, 48\] in the model and \[384, 48\] in the table$"
    ):
        check_table(model, wider)
    swapped = (table[1], table[0], *table[2:])
    message = r"differ: parameter 0 is embed\.weight in the model and layers\.0\.attention_norm\.weight in the table$"
    with pytest.raises(AssertionError, match=message):
        check_table(model, swapped)
