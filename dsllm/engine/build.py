"""Builds the engine: a model, its parameter table, the run's optimizer and the final DeepSpeed config join into one value."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsllm.config.train import Precision, TrainConfig
from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.optimizers import make_optimizer
from dsllm.engine.processes.communication_threads import without_teams
from dsllm.engine.processes.device import parameter_dtype
from dsllm.engine.processes.process_group import World, bound_all_groups
from dsllm.engine.settings.offload import offload_devices
from dsllm.engine.wrappers.registry import wrapper_of
from dsllm.engine.wrappers.wrapper import Wrapper
from dsllm.parameters import ParameterTable


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model under DeepSpeed, with what the step and the state need to know about it."""

    deepspeed: Any
    """The DeepSpeedEngine."""
    wrapper: Wrapper
    """The interface to DeepSpeed's optimizer wrapper."""
    world: World
    table: ParameterTable
    precision: Precision
    stage: int
    """ZeRO stage."""
    gradient_clipping: float
    """Largest gradient norm; 0: off."""

    @property
    def module(self) -> nn.Module:
        """The model itself. Under ZeRO-3 its parameters are empty between calls."""
        return self.deepspeed.module

    @property
    def parameter_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and global shapes of the parameters, in the model's order, also where ZeRO-3 has partitioned them."""
        parameters: list[tuple[str, Any]] = list(self.module.named_parameters())
        return [(name, tuple(p.ds_shape if self.stage == 3 else p.shape)) for name, p in parameters]

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper of the optimizer; the optimizer itself in fp32 at ZeRO-0."""
        return self.deepspeed.optimizer

    @property
    def loss_scale(self) -> float:
        """Factor on the loss during backward; 1 except in fp16."""
        return float(self.optimizer.loss_scale) if self.precision == "fp16" else 1.0


def build_engine(
    make_model: Callable[[], nn.Module],
    table: ParameterTable,
    train: TrainConfig,
    precision: Precision,
    config: Mapping[str, Any],
    world: World,
) -> Engine:
    """Build the engine with uninitialised weights; `load_state` fills them.

    Args:
        make_model: builds the module with uninitialised parameters in torch's default dtype and device; called once
        table: the model's parameters; those that are not trainable are frozen
        train: for its optimizer and its clipping
        precision: the run's, with auto resolved
        config: the final DeepSpeed config

    Raises:
        LaunchError: this version of DeepSpeed is not known well enough to read its state.
    """
    stage = config["zero_optimization"]["stage"]
    with _construction(stage, precision, config, world):
        model = make_model()
    parameters = dict(model.named_parameters())
    for row in table:
        parameters[row.name].requires_grad_(row.trainable)
    optimizer = make_optimizer(model, table, train.optimizer)
    # one of DeepSpeed's wrappers prints memory tables
    with without_teams(world), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, config=dict(config), optimizer=optimizer, dist_init_required=False
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {parameter_dtype(precision)}, f"in {precision} DeepSpeed made the parameters {dtypes}"
    bound_all_groups(world.timeout)
    wrapper = wrapper_of(engine, world)
    wrapper.fix(precision, offloads=offload_devices(config["zero_optimization"]) != ("none", "none"))
    return Engine(
        deepspeed=engine,
        wrapper=wrapper,
        world=world,
        table=table,
        precision=precision,
        stage=stage,
        gradient_clipping=train.gradient_clipping,
    )


@contextlib.contextmanager
def _construction(stage: int, precision: Precision, config: Mapping[str, Any], world: World) -> Iterator[None]:
    """Make parameters on the device and in the type that the layers need, so that no fp32 copy of the model ever exists.

    ZeRO-3 shards each module as soon as it is constructed, so that no rank ever has the whole model. The parameters' type
    is then left to the config, which names it. Given as `dtype`, DeepSpeed 0.19.8 takes bf16 instead wherever its
    accelerator does not support fp16, as most CPUs do not (partition_parameters.py, line 409: an `or` that binds looser
    than it reads); an fp32 run then trains in bf16, masters included.
    """
    if stage == 3:
        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # ZeRO++'s, of an earlier engine in this process
        with deepspeed.zero.Init(config_dict_or_path=dict(config)):
            yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(parameter_dtype(precision))
    try:
        with world.device:
            yield
    finally:
        torch.set_default_dtype(default)
