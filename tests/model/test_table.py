"""The table of parameters is the built model: names, order and shapes, for every shape and every named size."""

import dataclasses

import pytest
import torch

from dsllm.config.model import ModelConfig
from dsllm.model.table import check_table
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table
from tests.helpers.models import CONTEXT, LLAMA
from tests.test_parameters import EVERY


def on_meta(config: ModelConfig, context_length: int) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, context_length)


@pytest.mark.parametrize("name", EVERY)
def test_the_table_is_the_model(name: str):
    config, context_length = EVERY[name]
    table = parameter_table(config, context_length)
    found = [(name, tuple(p.shape)) for name, p in on_meta(config, context_length).named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in table] == found
    check_table(on_meta(config, context_length), table)


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
