"""Rotary positions: rotations, relative, partial, and exact at positions that bf16 cannot count."""

import dataclasses

import torch

from dsllm.config.model import ModelConfig
from dsllm.model.rotary import RotaryTable, rotary_frequencies, rotate
from tests.helpers.models import SCALING

CONFIG = ModelConfig(hidden_size=32, num_heads=2)  # heads of width 16
X = torch.randn(2, 10, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def turned(x: torch.Tensor, config: ModelConfig = CONFIG, start: int = 0) -> torch.Tensor:
    return rotate(x, *RotaryTable(config).at(start, start + x.shape[1], x))


def test_pairs_turn_by_position_times_frequency():
    frequencies = rotary_frequencies(CONFIG, 16).double()
    angles = torch.outer(torch.arange(10, dtype=torch.float64), frequencies)
    pairs = torch.complex(X[..., :8], X[..., 8:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    wanted = torch.cat((pairs.real, pairs.imag), -1).transpose(1, 2)
    assert torch.allclose(turned(X), wanted, atol=1e-6)  # the table is fp32


def test_products_depend_on_the_distance_only():
    near = turned(X)[:, :, 7] * turned(X)[:, :, 3]
    far = turned(X, start=40)[:, :, 7] * turned(X, start=40)[:, :, 3]
    assert torch.allclose(near.sum(-1), far.sum(-1), atol=1e-5)


def test_the_rest_of_a_partly_rotated_head_stays():
    config = dataclasses.replace(CONFIG, rope_fraction=0.5)
    out = turned(X, config)
    assert torch.equal(out[..., 8:], X.transpose(1, 2)[..., 8:])
    narrow = dataclasses.replace(CONFIG, head_size=8)
    assert torch.allclose(out[..., :8], turned(X[..., :8].contiguous(), narrow))


def test_gradients():
    x = X[:1, :4].clone().requires_grad_()
    for fraction in (1.0, 0.5):
        config = dataclasses.replace(CONFIG, rope_fraction=fraction)
        assert torch.autograd.gradcheck(lambda x, c=config: turned(x, c), (x,))


def test_each_token_turns_by_its_own_position():
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 7, 8, 9], [30, 2, 2, 4, 0, 0, 1, 2, 3, 4]])
    found = rotate(X, *RotaryTable(CONFIG).at(0, 31, X, positions))
    for sequence, row in enumerate(positions.tolist()):
        for token, position in enumerate(row):
            alone = turned(X[sequence : sequence + 1, token : token + 1], start=position)
            assert torch.equal(found[sequence, :, token], alone[0, :, 0])


def test_gradients_at_given_positions():
    x, positions = X[:, :4].clone().requires_grad_(), torch.tensor([[0, 1, 0, 1], [3, 2, 1, 0]])
    for fraction in (1.0, 0.5):
        tables = RotaryTable(dataclasses.replace(CONFIG, rope_fraction=fraction)).at(0, 4, x, positions)
        assert torch.autograd.gradcheck(lambda x, tables=tables: rotate(x, *tables), (x,))


def test_low_precision_tables_are_rounded_from_exact_ones():
    cosines, _ = RotaryTable(CONFIG).at(4000, 4001, torch.zeros(1, dtype=torch.bfloat16))
    exact, _ = RotaryTable(CONFIG).at(4000, 4001, torch.zeros(1))
    assert torch.equal(cosines, exact.bfloat16())


def test_stretched_frequencies_by_the_paper():
    # Llama 3: long waves are stretched by the factor, short ones kept, those between interpolated in turns.
    config = dataclasses.replace(CONFIG, rope_scaling=SCALING)
    plain, stretched = rotary_frequencies(CONFIG, 16), rotary_frequencies(config, 16)
    turns = SCALING.original_context_length * plain / (2 * torch.pi)
    assert torch.equal(stretched[turns > 4], plain[turns > 4])
    assert torch.equal(stretched[turns < 1], plain[turns < 1] / 4)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (turns > 4).any() and (turns < 1).any()
    assert ((stretched < plain) & (stretched > plain / 4))[between].all()


def test_a_longer_sequence_extends_the_table():
    table = RotaryTable(CONFIG)
    short = table.at(0, 4, X)[0].clone()
    assert torch.equal(table.at(0, 8, X)[0][:4], short)
    assert table.at(6, 8, X)[0].shape == (2, 16)
