"""Building an engine never makes a second copy of the model in fp32, and masters get the initial values to the last bit."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dsllm.config.model import ModelConfig
from dsllm.config.train import Precision
from dsllm.engine.build import build_engine
from dsllm.engine.processes.device import parameter_dtype
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.state import load_state, owned_slices
from dsllm.model.initial import initial_value
from dsllm.model.kernels import TORCH
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table
from dsllm.session.assembly import build_model
from dsllm.slices import WEIGHTS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import SEQUENCE_LENGTH, first_state, tiny_engine, tiny_run

MODEL = ModelConfig(num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=2, mlp_size=384, vocab_size=2000)
TABLE = parameter_table(MODEL, SEQUENCE_LENGTH)
NUM_PARAMETERS = sum(row.num_elements for row in TABLE)
LARGEST = max(row.num_elements for row in TABLE)
ROUNDING = 0.01
"""Positions, and the sizes that memory comes in, in shares of the parameters."""
MODES: tuple[tuple[Precision, int], ...] = (
    ("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)
)  # fmt: skip


def most_held(function: Callable[[], Transformer | None]) -> tuple[Transformer | None, int]:
    """A function's result, and the most bytes of tensors that were allocated in it and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, most


def bytes_of_construction_and_loading(world: World) -> dict[tuple[Precision, int], tuple[int, int]]:
    """The most that the model's construction holds, and that loading its initial values adds."""
    found = {}
    for precision, stage in MODES:
        config = dataclasses.replace(tiny_run(precision=precision), model=MODEL)
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        layout = Layout(mesh=world.mesh, device="cpu", precision=precision)
        final = final_config(config, {"zero_optimization": zero}, layout)
        made: list[int] = []

        def make_model(config=config, precision=precision, made=made) -> Transformer:
            model, most = most_held(lambda: build_model(config, precision, TORCH))
            made.append(most)
            assert model is not None
            return model

        engine = build_engine(make_model, TABLE, config.train, precision, final, world)
        _, loading = most_held(lambda engine=engine, config=config: load_state(engine, first_state(config)))
        found[precision, stage] = (made[0], loading)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_second_copy_of_the_model_is_made(world_size):
    for of_rank in run_ranks(world_size, bytes_of_construction_and_loading):
        for (precision, stage), (construction, loading) in of_rank.items():
            width = parameter_dtype(precision).itemsize
            # at ZeRO-3 modules are whole for a moment, and some until garbage is collected; a second copy in fp32 is far more
            whole = 3 * LARGEST if stage == 3 else 0
            assert construction <= width * ((1 + ROUNDING) * NUM_PARAMETERS + whole), (precision, stage)
            # one parameter at a time: its values, and what is rounded of them
            assert loading <= (4 + width) * LARGEST + 4 * ROUNDING * NUM_PARAMETERS, (precision, stage)


def unequal_to_initial_values(world: World) -> list[tuple[Precision, int, str]]:
    """Masters that are not the initial values, and weights that are not these, rounded."""
    found = []
    for precision, stage in MODES:
        config = tiny_run(precision=precision)
        engine = tiny_engine(world, config, stage)
        values = {row.name: initial_value(row, config.run.seed) for row in engine.table}
        for part in owned_slices(engine):
            if not torch.equal(part.tensors[WEIGHTS], part.region.of(values[part.name])):
                found.append((precision, stage, part.name))
        if stage < 3:
            for name, weight in engine.module.named_parameters():
                if not torch.equal(weight, values[name].to(weight.dtype)):
                    found.append((precision, stage, name))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_are_the_initial_values(world_size):
    assert run_ranks(world_size, unequal_to_initial_values) == [[]] * world_size
