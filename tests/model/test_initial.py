"""Initial values are a function of seed and name: the same whatever else the model holds."""

import dataclasses
import hashlib
import math

import pytest
import torch

from dsllm.config.model import ModelConfig
from dsllm.model.initial import fill_initial, initial_value
from dsllm.model.transformer import Transformer
from dsllm.parameters import Parameter, parameter_table
from tests.helpers.models import CONTEXT, GPT2, LLAMA

CONFIG = ModelConfig(num_layers=8, hidden_size=256, num_heads=4, mlp_size=256, vocab_size=1000)


def row(name: str, config: ModelConfig = CONFIG) -> Parameter:
    """One parameter of the model."""
    return {parameter.name: parameter for parameter in parameter_table(config, CONTEXT)}[name]


def test_the_same_seed_and_name_give_the_same_values_whatever_was_drawn_before():
    first = initial_value(row("layers.3.mlp.up.weight"), 1)
    torch.randn(100)
    initial_value(row("layers.3.mlp.gate.weight"), 1)
    assert torch.equal(first, initial_value(row("layers.3.mlp.up.weight"), 1))
    assert not torch.equal(first, initial_value(row("layers.3.mlp.up.weight"), 2))
    assert not torch.equal(first, initial_value(row("layers.4.mlp.up.weight"), 1))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    initial_value(row("head.weight"), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_standard_deviations():
    # 65,536 draws: the sample's standard deviation is within 1 % (3.6 sigma) of the true one
    plain = initial_value(row("layers.0.mlp.up.weight"), 1)
    output = initial_value(row("layers.0.attention.output.weight"), 1)
    down = initial_value(row("layers.0.mlp.down.weight"), 1)
    assert plain.shape == output.shape == down.shape == (256, 256)
    assert math.isclose(plain.std(), 0.02, rel_tol=0.01)
    assert math.isclose(output.std(), 0.02 / 4, rel_tol=0.01)  # sqrt(2 x 8 layers) = 4
    assert math.isclose(down.std(), 0.02 / 4, rel_tol=0.01)


def test_padding_rows_are_zero_and_do_not_move_the_others():
    padded = initial_value(row("embed.weight"), 1)
    exact = initial_value(dataclasses.replace(row("embed.weight"), shape=(1000, 256), padded_rows=0), 1)
    assert padded.shape == (1024, 256)
    assert torch.equal(padded[:1000], exact) and (padded[1000:] == 0).all()


def test_norms_are_ones_and_biases_zeros():
    config = dataclasses.replace(GPT2, qk_norm=True)
    model, table = Transformer(config, CONTEXT), parameter_table(config, CONTEXT)
    fill_initial(model, table, 1)
    constant = {"norm": 1.0, "bias": 0.0}
    seen = set()
    for parameter, value in zip(table, model.parameters(), strict=True):
        if parameter.role in constant:
            seen.add(parameter.role)
            assert (value == constant[parameter.role]).all(), parameter.name
    assert seen == {"norm", "bias"}


def test_the_recipe_never_changes():
    # Runs of earlier versions are repeated from their seed alone, so the recipe is written out here once more.
    digest = hashlib.sha256(b"7/embed.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = torch.zeros(1000, 256).normal_(0.0, 0.02, generator=generator)
    assert torch.equal(initial_value(row("embed.weight"), 7)[:1000], drawn)


def test_another_model_is_not_filled():
    with pytest.raises(AssertionError, match=r"positions\.weight is in the table but not in the model"):
        fill_initial(
            Transformer(LLAMA, CONTEXT), parameter_table(dataclasses.replace(LLAMA, positions="learned"), 64), 1
        )
