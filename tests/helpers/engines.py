"""Engines over a changed parameter table, states with known numbers, and what the layers of an engine see."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from dsllm.config.run import RunConfig
from dsllm.engine.build import Engine, build_engine
from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.state import load_state
from dsllm.model.initial_state import InitialValues
from dsllm.model.kernels import TORCH
from dsllm.model.transformer import Transformer
from dsllm.parameters import ParameterTable
from dsllm.session.assembly import build_model
from dsllm.slices import WEIGHTS, Region, StateReader
from tests.helpers.tiny import SMALL_BUCKETS, TABLE

MOMENTS = ("exp_avg", "exp_avg_sq")


def changed_table(names: Iterable[str], **changes: Any) -> ParameterTable:
    """The tiny model's table with other values in the rows of these parameters."""
    chosen = set(names)
    assert chosen <= {row.name for row in TABLE}
    return tuple(dataclasses.replace(row, **changes) if row.name in chosen else row for row in TABLE)


def engine_of(
    world: World,
    config: RunConfig,
    stage: int,
    table: ParameterTable = TABLE,
    reader: StateReader | None = None,
    make_model: Callable[[], Transformer] | None = None,
) -> Engine:
    """An engine over a table or a model that no config gives yet: frozen parameters, factors, auxiliary losses.

    Args:
        make_model: None (default): the tiny run's
    """
    precision = config.train.precision
    assert precision != "auto"
    given = {"zero_optimization": {"stage": stage, **(SMALL_BUCKETS if stage else {})}}
    final = final_config(config, given, Layout(mesh=world.mesh, device="cpu", precision=precision))
    make_model = make_model or partial(build_model, config, precision, TORCH)
    engine = build_engine(make_model, table, config.train, precision, final, world)
    load_state(engine, reader or InitialValues(table, config.run.seed))
    return engine


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of the weights that the layers see, whole; a collective call at ZeRO-3."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.stage == 3):
            found[name] = parameter.detach().clone()
    return found


class NumberedState:
    """A state in which every element of every tensor is another number, exact in bf16 only where it is small."""

    def __init__(self, keys: tuple[str, ...] = (WEIGHTS, *MOMENTS)):
        self._keys = keys
        self._numbers = {row.name: number for number, row in enumerate(TABLE)}

    def whole(self, name: str, key: str) -> torch.Tensor:
        """All values of one tensor, 1-d."""
        count = math.prod(next(row.shape for row in TABLE if row.name == name))
        start = 1000 * self._numbers[name] + 100_000 * ((WEIGHTS, *MOMENTS).index(key) if key in MOMENTS else 0)
        return torch.arange(start, start + count, dtype=torch.float32) / 2**17

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """See StateReader."""
        return self.whole(name, key)[region.start : region.stop]

    def keys(self, name: str) -> tuple[str, ...]:
        """See StateReader."""
        return self._keys

    def scalars(self, name: str) -> Mapping[str, float]:
        """See StateReader."""
        return {"step": 5.0}
