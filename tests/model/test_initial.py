"""Initial values are a function of seed and name: the same whatever else the model holds."""

import dataclasses
import math

import torch

from dsllm.config.model import ModelConfig
from dsllm.model.initial import fill_initial, initial_value
from dsllm.model.transformer import Transformer
from tests.helpers.models import GPT2

CONFIG = ModelConfig(num_layers=8, hidden_size=256, num_heads=4, vocab_size=1000)


def test_the_same_seed_and_name_give_the_same_values_whatever_was_drawn_before():
    first = initial_value("layers.3.mlp.up.weight", (64, 32), CONFIG, 1)
    torch.randn(100)
    initial_value("layers.3.mlp.gate.weight", (64, 32), CONFIG, 1)
    assert torch.equal(first, initial_value("layers.3.mlp.up.weight", (64, 32), CONFIG, 1))
    assert not torch.equal(first, initial_value("layers.3.mlp.up.weight", (64, 32), CONFIG, 2))
    assert not torch.equal(first, initial_value("layers.4.mlp.up.weight", (64, 32), CONFIG, 1))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    initial_value("head.weight", (1024, 8), CONFIG, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_standard_deviations():
    # 65,536 draws: the sample's standard deviation is within 1 % (3.6 sigma) of the true one
    plain = initial_value("layers.0.mlp.up.weight", (256, 256), CONFIG, 1)
    output = initial_value("layers.0.attention.output.weight", (256, 256), CONFIG, 1)
    down = initial_value("layers.0.mlp.down.weight", (256, 256), CONFIG, 1)
    assert math.isclose(plain.std(), 0.02, rel_tol=0.01)
    assert math.isclose(output.std(), 0.02 / 4, rel_tol=0.01)  # sqrt(2 x 8 layers) = 4
    assert math.isclose(down.std(), 0.02 / 4, rel_tol=0.01)


def test_padding_rows_are_zero_and_do_not_move_the_others():
    padded = initial_value("embed.weight", (1024, 16), CONFIG, 1)
    exact = initial_value("embed.weight", (1000, 16), CONFIG, 1)
    assert torch.equal(padded[:1000], exact) and (padded[1000:] == 0).all()


def test_norms_are_ones_and_biases_zeros():
    model = Transformer(dataclasses.replace(GPT2, qk_norm=True), 64)
    fill_initial(model, GPT2, 1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
