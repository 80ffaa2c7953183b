"""One assembly: the engine that parity trains with is the one that a run gets."""

import dataclasses
from typing import Any

import pytest
import torch

from dsllm.engine.build import Engine
from dsllm.engine.processes.process_group import World
from dsllm.errors import ConfigError
from dsllm.model.initial_state import InitialValues
from dsllm.model.kernels import TORCH
from dsllm.parameters import parameter_table
from dsllm.parity.combinations import Combination
from dsllm.parity.engine_run import make_engine
from dsllm.parity.tiny_run import run_of
from dsllm.session.assembly import build_model, ready_engine
from dsllm.session.machine import run_on_machine
from dsllm.slices import WEIGHTS, Region, whole
from tests.helpers.engines import NumberedState, whole_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import TABLE, tiny_engine, tiny_run

SEED = 5
COMBINATIONS = {
    2: [
        Combination(stage=0, precision="fp32", world_size=2),
        Combination(stage=1, precision="bf16", world_size=2, accumulation=3),
        Combination(stage=2, precision="fp32_compute_bf16", world_size=2, activation_checkpointing="full"),
        Combination(stage=3, precision="bf16", world_size=2, clipping=False, tied=True),
    ],
    1: [Combination(stage=stage) for stage in (0, 1, 2, 3)],
}


def facts(engine: Engine) -> dict[str, Any]:
    """Everything that decides how an engine trains, but for the tensors themselves."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    deepspeed = engine.deepspeed
    return {
        "config": deepspeed._config._param_dict,
        "wrapper": (type(engine.wrapper), type(engine.optimizer), type(engine.wrapper.torch_optimizer)),
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in engine.wrapper.torch_optimizer.param_groups
        ],
        "pieces": [(p.name, p.start, p.count, p.group, p.offset) for p in engine.wrapper.pieces()],
        "parameters": [(names[id(p)], p.dtype, p.requires_grad) for p in engine.module.parameters()],
        "modules": [(name, type(module)) for name, module in engine.module.named_modules()],
        "fields": (engine.table, engine.precision, engine.stage, engine.gradient_clipping),
        "forwards": sorted(name for name in vars(engine.optimizer) if callable(vars(engine.optimizer)[name])),
    }


def as_train_builds_it(world: World, combination: Combination) -> Engine:
    """As `open_session` does: the run on this machine, the final config of these hosts, the ready engine."""
    run = run_on_machine(run_of(combination, SEED), combination.deepspeed_json(), world.ranks)
    return ready_engine(run.config, run.final_config(world), run.layout.precision, world)


def compare(world: World) -> None:
    for combination in COMBINATIONS[world.size]:
        ours, paritys = as_train_builds_it(world, combination), make_engine(world, combination, SEED)
        expected = facts(ours)
        assert len(expected["groups"]) == 2 and len(expected["config"]) > 5
        for key, value in facts(paritys).items():
            assert value == expected[key], f"{combination.name}: {key}"
        seen = whole_weights(ours)
        assert all(torch.equal(weights, seen[name]) for name, weights in whole_weights(paritys).items())


@pytest.mark.parametrize("world_size", COMBINATIONS)
def test_parity_proves_the_engine_that_a_run_gets(world_size):
    run_ranks(world_size, compare)


def loaded(world: World) -> None:
    """Without a state the seed decides; a state given is what the layers see."""
    config = tiny_run(precision="bf16")
    initial, numbers = InitialValues(TABLE, config.run.seed), NumberedState()
    for stage in (1, 3):
        for state in (None, numbers):
            for name, weights in whole_weights(tiny_engine(world, config, stage, state)).items():
                shape = tuple(weights.shape)
                expected = (state or initial).read(name, WEIGHTS, Region(whole(shape), 0, weights.numel()))
                assert torch.equal(weights.flatten(), expected.bfloat16()), (stage, name)


def test_a_ready_engine_has_its_state():
    run_ranks(2, loaded)


def without_kernels(world: World) -> str:
    config = tiny_run()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, kernels="liger"))
    with pytest.raises(ConfigError) as caught:
        ready_engine(config, {}, "fp32", world)
    return str(caught.value)


def test_kernels_that_this_device_does_not_have_are_refused():
    (text,) = run_ranks(1, without_kernels)
    assert "train.kernels" in text


@pytest.mark.parametrize("what", ["none", "full"])
def test_the_model_is_the_tables_whatever_is_recomputed(what):
    config = tiny_run(activation_checkpointing=what)
    model = build_model(config, "bf16", TORCH)
    table = parameter_table(config.model, config.context_length)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == [(row.name, row.shape) for row in table]
