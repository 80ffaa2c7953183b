"""Assembles a ready engine from a run; training, parity, benchmarks and tests use the same function."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.engine.build import Engine, build_engine
from dsllm.engine.processes.device import check_compiler, compute_dtype
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_state
from dsllm.model.initial_state import InitialValues
from dsllm.model.kernels import Kernels, load_kernels
from dsllm.model.recompute import Recompute
from dsllm.model.table import check_shapes
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table
from dsllm.slices import StateReader


def ready_engine(
    config: RunConfig, final: Mapping[str, Any], precision: Precision, world: World, state: StateReader | None = None
) -> Engine:
    """Build a run's engine and give it its state; a collective call.

    Args:
        final: the final DeepSpeed config
        precision: the run's, with auto resolved
        state: what the run starts or resumes from; None (default): the initial values of its seed

    Raises:
        ConfigError: this device cannot run train.kernels or train.compile.
        LaunchError: this version of DeepSpeed is not known well enough.
        CheckpointError: the state cannot be read.
    """
    if config.train.compile:
        check_compiler(world.device)
    kernels = load_kernels(config.train.kernels, world.device.type)
    table = parameter_table(config.model, config.context_length)
    make_model = partial(build_model, config, precision, kernels)
    engine = build_engine(make_model, table, config.train, precision, final, world)
    check_shapes(engine.parameter_shapes, table)
    load_state(engine, state or InitialValues(table, config.run.seed))
    return engine


def build_model(config: RunConfig, precision: Precision, kernels: Kernels) -> Transformer:
    """The run's model as it is trained, with uninitialised parameters."""
    recompute = Recompute(what=config.train.activation_checkpointing, offload=config.train.activation_offload)
    model = Transformer(config.model, config.context_length, compute_dtype(precision), recompute, kernels)
    if config.train.compile:
        model.compile_layers()
    return model
