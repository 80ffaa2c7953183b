"""The engine that is built updates each parameter as its row says: exactly as torch's AdamW does in a plain loop."""

import math

import numpy as np
import pytest
import torch

from dsllm.config.optimizer import AdamWConfig
from dsllm.config.run import RunConfig
from dsllm.engine.optimizers import LEARNING_RATE_FACTOR, set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.model.initial import fill_initial
from dsllm.parameters import Parameter, ParameterTable
from tests.helpers.engines import changed_table, engine_of, whole_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GLOBAL_BATCH, SEQUENCE_LENGTH, TABLE, micro_batches, tiny_model, tiny_run, tiny_step

STAGES = (0, 1, 2, 3)
STEPS = 3
SLOW = ("layers.0.mlp.up.weight", "layers.2.attention_norm.weight")
DECAY = 0.3


def factors() -> ParameterTable:
    """Rows that learn at a tenth of the rate, rows that decay at half the rate, and rows that do not decay."""
    changes = {name: {"learning_rate_factor": 0.1} for name in SLOW}
    changes["layers.1.mlp.down.weight"] = {"weight_decay_factor": 0.5}
    changes["embed.weight"] = {"weight_decay_factor": 0.0}
    table = TABLE
    for name, change in changes.items():
        (changed,) = (row for row in changed_table([name], **change) if row.name == name)
        table = tuple(changed if row.name == name else row for row in table)
    return table


def run_in_one_micro_batch() -> RunConfig:
    """Sums over 128 tokens in one backward pass: the loss is divided by a power of two, which rounds nothing."""
    assert math.log2(GLOBAL_BATCH * SEQUENCE_LENGTH).is_integer()
    optimizer = AdamWConfig(learning_rate=1e-2, weight_decay=DECAY)
    return tiny_run(micro_batch_sequences=GLOBAL_BATCH, gradient_clipping=0.0, optimizer=optimizer)


def rate(step: int) -> float:
    return 1e-2 / (step + 1)


def trained(world: World, stage: int) -> dict[str, np.ndarray]:
    """The weights after some steps; numpy, since a tensor would travel through a socket that ends with its rank."""
    config = run_in_one_micro_batch()
    engine = engine_of(world, config, stage, factors())
    for step in range(STEPS):
        set_learning_rate(engine.optimizer, rate(step))
        tiny_step(engine, config, step)
    return {name: weights.numpy() for name, weights in whole_weights(engine).items()}


def plain_loop() -> dict[str, torch.Tensor]:
    """The same run with one optimizer per parameter, its rate and decay computed here from the row."""
    config, model = run_in_one_micro_batch(), tiny_model(run_in_one_micro_batch())
    fill_initial(model, TABLE, config.run.seed)
    parameters = dict(model.named_parameters())

    def adamw(row: Parameter) -> torch.optim.AdamW:
        decay = DECAY * row.weight_decay_factor
        betas = (config.train.optimizer.beta1, config.train.optimizer.beta2)
        return torch.optim.AdamW([parameters[row.name]], betas=betas, weight_decay=decay, fused=True)

    optimizers = {row: adamw(row) for row in factors()}
    for step in range(STEPS):
        (batch,) = micro_batches(config, step, 0, 1)
        losses = model(batch.inputs, batch.targets).losses
        (losses.sum() / losses.numel()).backward()
        for row, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rate(step) * row.learning_rate_factor
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_rate_and_decay_of_each_row_reach_the_update_exactly(stage):
    expected = plain_loop()
    (found,) = run_ranks(1, trained, stage)
    for name, weights in found.items():
        assert np.array_equal(weights, expected[name].numpy()), name


def groups(world: World, stage: int) -> list[tuple[int, float, float]]:
    """Elements that this rank updates, factor and decay of each of DeepSpeed's optimizer groups."""
    engine = engine_of(world, run_in_one_micro_batch(), stage, factors())
    sizes = [0] * len(engine.optimizer.param_groups)
    for piece in engine.wrapper.trainable_pieces():
        sizes[piece.group] += piece.count
    return [
        (size, group[LEARNING_RATE_FACTOR], group["weight_decay"])
        for size, group in zip(sizes, engine.optimizer.param_groups, strict=True)
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_keeps_the_groups_of_the_table(stage):
    expected: dict[tuple[float, float], int] = {}
    for row in factors():
        key = (row.learning_rate_factor, DECAY * row.weight_decay_factor)
        expected[key] = expected.get(key, 0) + row.num_elements
    assert len(expected) == 5
    (found,) = run_ranks(1, groups, stage)
    assert {(factor, decay): size for size, factor, decay in found} == expected
