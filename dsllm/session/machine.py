"""Resolves a run for this machine: device, precision, layout, and a final DeepSpeed config that is the same on all ranks."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from dsllm import counts
from dsllm.byte_units import GIB
from dsllm.config.precision import resolve_precision
from dsllm.config.run import RunConfig
from dsllm.config.train import DeviceType, Precision
from dsllm.engine.processes.device import check_compiler, choose_device
from dsllm.engine.processes.process_group import World
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout, ranks_by_node
from dsllm.engine.settings.offload import offload_devices
from dsllm.errors import CheckpointError, ConfigError, LaunchError
from dsllm.mesh import make_mesh
from dsllm.model.kernels import load_kernels


@dataclass(frozen=True, kw_only=True)
class RunOnMachine:
    """A run on this rank's machine, before the ranks have met."""

    config: RunConfig
    """The run with its precision resolved: on another device `auto` would mean another one."""
    given: Mapping[str, Any]
    """The DeepSpeed JSON that the run names."""
    device: torch.device
    layout: Layout

    def in_precision(self, precision: Precision) -> "RunOnMachine":
        """The same in another precision; only `final_config` says whether the device has it."""
        train = dataclasses.replace(self.config.train, precision=precision)
        layout = dataclasses.replace(self.layout, precision=precision)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train), layout=layout)

    def final_config(self, world: World) -> dict[str, Any]:
        """The final DeepSpeed config, from the hosts as they are: the same on every rank. A collective call.

        Raises:
            ConfigError: the run cannot work on these hosts.
        """
        hosts = ranks_by_node(world.gather((world.ranks.local_rank, world.ranks.local_size)))
        return final_config(self.config, self.given, dataclasses.replace(self.layout, ranks_by_node=hosts))


def run_on_machine(config: RunConfig, given: Mapping[str, Any], ranks: Ranks) -> RunOnMachine:
    """Resolve a run on this rank's machine, and refuse what can be refused before the ranks meet.

    Raises:
        ConfigError: the run, its DeepSpeed JSON, the number of ranks and the device, or the memory, do not fit together.
        LaunchError: there is no GPU for this rank, or train.device is another device than this machine's.
        MissingExtra: the run's kernels are not installed.
    """
    device = choose_device(ranks.local_rank)
    _check_device(config.train.device, device)
    precision = resolve_precision(config.train.precision, device.type)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    mesh = make_mesh(config.parallel, ranks.world_size)
    layout = Layout(mesh=mesh, device=device.type, precision=precision, ranks_by_node=None)
    final = final_config(config, given, layout)  # the rules about hosts wait until all hosts are known
    if device.type == "cpu":
        _check_memory(config, final, layout, ranks.local_size)
    load_kernels(config.train.kernels, device.type)
    if config.train.compile:
        check_compiler(device)
    return RunOnMachine(config=config, given=given, device=device, layout=layout)


def _check_memory(config: RunConfig, final: Mapping[str, Any], layout: Layout, local_size: int) -> None:
    """Refuse a model whose states alone are twice the memory of this host, which no swap space saves."""
    zero = final["zero_optimization"]
    if config.model.vocab_size is None or "nvme" in offload_devices(zero):
        return
    num_parameters = counts.parameter_count(config.model, config.context_length).total
    states = counts.model_states(num_parameters, zero["stage"], layout.precision, layout.data_size).after_step
    needed, there = states * local_size, psutil.virtual_memory().total
    if needed > 2 * there:
        raise ConfigError(
            f"model: its {num_parameters:,} parameters need {needed / GIB:,.0f} GiB of model states for {local_size} ranks on "
            f"this host, which has {there / GIB:,.0f} GiB of memory: use more hosts with ZeRO 3, or a smaller model"
        )


def _check_device(requested: DeviceType, found: torch.device) -> None:
    if requested == "cuda" and found.type != "cuda":
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        raise LaunchError(
            f"train.device: cuda, but torch sees no GPU here (this torch is built {built}; CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): see `dsllm doctor`, or set train.device to auto or cpu"
        )
    if requested == "cpu" and found.type != "cpu":
        raise LaunchError(
            "train.device: cpu, but torch and DeepSpeed have already seen a GPU in this process: set CUDA_VISIBLE_DEVICES= "
            "before it starts"
        )


def in_saved_precision(
    run: RunOnMachine, precision: Precision, world: World, report: Callable[[str], None]
) -> tuple[RunOnMachine, dict[str, Any]]:
    """The run in the precision that it began in, although its auto means another one on this device.

    Raises:
        CheckpointError: this device cannot train in it.
    """
    saved, here = run.in_precision(precision), run.layout.precision
    try:
        final = saved.final_config(world)
    except ConfigError as error:
        raise CheckpointError(
            f"run.directory {run.config.run.directory}: began in {precision}, in which it cannot continue here: {error}\n"
            f"Continue it where {precision} works, or start a new run from its weights here: set train.precision={here}, "
            f"another run.directory, and model.init_from={run.config.run.directory}"
        ) from error
    report(f"train.precision auto: continuing in {precision}, as the run began; a new run here would use {here}")
    return saved, final
