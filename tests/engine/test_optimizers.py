"""Optimizer groups follow the parameter table: decay, learning-rate factors, frozen parameters."""

import dataclasses

import pytest

from dsllm.config.optimizer import AdamWConfig
from dsllm.engine.optimizers import make_optimizer, optimizer_groups, set_learning_rate
from dsllm.model.transformer import Transformer
from dsllm.parameters import ParameterTable, parameter_table
from tests.helpers.models import LLAMA

CONFIG = AdamWConfig(learning_rate=3.0, weight_decay=0.5)
MODEL = dataclasses.replace(LLAMA, qk_norm=True, mlp_bias=True)
TABLE = parameter_table(MODEL, 64)


def with_rows(**changes) -> ParameterTable:
    """The table with another value in every row of the MLPs."""
    return tuple(dataclasses.replace(row, **changes) if row.part == "mlp" else row for row in TABLE)


def test_matrices_are_decayed_and_norms_and_biases_are_not():
    decayed, free = optimizer_groups(TABLE, CONFIG)
    ndim = {row.name: len(row.shape) for row in TABLE}
    assert decayed.weight_decay == 0.5 and all(ndim[name] == 2 for name in decayed.names)
    assert free.weight_decay == 0.0 and all(ndim[name] == 1 for name in free.names)
    assert sorted([*decayed.names, *free.names]) == sorted(ndim)
    order = [row.name for row in TABLE]
    assert all(list(group.names) == sorted(group.names, key=order.index) for group in (decayed, free))


def test_a_factor_makes_groups_of_its_own_and_scales_the_schedule():
    groups = optimizer_groups(with_rows(learning_rate_factor=0.1), CONFIG)
    assert [(group.weight_decay, group.learning_rate_factor) for group in groups] == [
        (0.5, 1.0), (0.0, 1.0), (0.5, 0.1), (0.0, 0.1),
    ]  # fmt: skip
    optimizer = make_optimizer(Transformer(MODEL, 64), with_rows(learning_rate_factor=0.1), CONFIG)
    set_learning_rate(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.0, 2.0, 0.2, 0.2])


def test_frozen_parameters_are_in_no_group():
    names = [name for group in optimizer_groups(with_rows(trainable=False), CONFIG) for name in group.names]
    assert names and not any(".mlp." in name for name in names)
