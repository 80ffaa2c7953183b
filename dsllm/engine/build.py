"""Builds the engine: a model, the final DeepSpeed config and an optimizer become something that takes steps."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsllm.config.train import OptimizerConfig, Precision, TrainConfig
from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.processes.communication_threads import without_teams
from dsllm.engine.processes.device import parameter_dtype
from dsllm.engine.processes.process_group import World, bound_all_groups
from dsllm.engine.wrappers.loss_scale import grow_after_step, stay_at_minimum
from dsllm.engine.wrappers.shared_masters import add_up_in_place, share_weights
from dsllm.engine.wrappers.skipped_step import let_go_of_skipped_gradients


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model under DeepSpeed, with what the step and the state need to know about it."""

    deepspeed: Any
    """The DeepSpeedEngine."""
    world: World
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
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper of the optimizer; torch's AdamW itself in fp32 at ZeRO stage 0."""
        return self.deepspeed.optimizer

    @property
    def wraps_nothing(self) -> bool:
        """True where DeepSpeed hands the step straight to AdamW, and checks neither norm nor finiteness."""
        return self.stage == 0 and self.precision in ("fp32", "fp32_compute_bf16")


def build_engine(
    make_model: Callable[[], nn.Module],
    decay_groups: Callable[[nn.Module], tuple[list[str], list[str]]],
    train: TrainConfig,
    precision: Precision,
    config: Mapping[str, Any],
    world: World,
) -> Engine:
    """Model -> DeepSpeed engine. The weights are whatever memory held: `load_state` gives them their values.

    Args:
        make_model: builds the module with uninitialised fp32 parameters; called once, inside ZeRO-3's partitioning.
        decay_groups: names of the parameters that weight decay applies to, and of the others.
        train: for its optimizer and its clipping.
        precision: the run's, with auto resolved.
        config: the final DeepSpeed config.
    """
    stage = config["zero_optimization"]["stage"]
    with _construction(stage, config):
        model = make_model()
    if stage < 3:
        model.to(device=world.device)
    adamw = _adamw(model, decay_groups(model), train.optimizer)
    # one of DeepSpeed's wrappers prints memory tables
    with without_teams(world), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, config=dict(config), optimizer=adamw, dist_init_required=False)
    found = {parameter.dtype for parameter in model.parameters()}
    assert found == {parameter_dtype(precision)}, f"in {precision} DeepSpeed made the parameters {found}"
    bound_all_groups(world.timeout)
    if stage == 0 and world.size == 1:
        # all gradients would be copied into a buffer and back, with nobody to add to them
        engine.enable_backward_allreduce = False
    offloads = not config["zero_optimization"].keys().isdisjoint(("offload_optimizer", "offload_param"))
    _mend(engine.optimizer, stage, precision, offloads, world)
    return Engine(
        deepspeed=engine, world=world, precision=precision, stage=stage, gradient_clipping=train.gradient_clipping
    )


def _mend(optimizer: Any, stage: int, precision: Precision, offloads: bool, world: World) -> None:
    """What DeepSpeed's wrapper of the optimizer does wrongly, or twice; each function says what and why."""
    if precision == "fp16":
        grow_after_step(optimizer)
        stay_at_minimum(optimizer)
    if stage in (1, 2) and offloads:
        let_go_of_skipped_gradients(optimizer)
    if stage > 0 and not offloads and parameter_dtype(precision) == torch.float32:
        share_weights(optimizer, stage)
        if stage < 3:
            add_up_in_place(optimizer, world)


def _construction(stage: int, config: Mapping[str, Any]) -> contextlib.AbstractContextManager:
    """ZeRO-3 shards each module as soon as it is constructed, so that no rank ever holds the whole model.

    The parameters' type is left to the config, which names it. Told by `dtype`, DeepSpeed 0.19.8 takes bf16 instead
    wherever its accelerator does not support fp16, as most CPUs do not (partition_parameters.py, line 409: an `or` that
    binds looser than it reads); an fp32 run then trains in bf16, masters and all.
    """
    if stage < 3:
        return contextlib.nullcontext()
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # ZeRO++'s, of an earlier engine in this process
    return deepspeed.zero.Init(config_dict_or_path=dict(config))


def _adamw(model: nn.Module, names: tuple[list[str], list[str]], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's own AdamW: as fast as DeepSpeed's, nothing to compile, and the one that ZeRO was tested with."""
    parameters = dict(model.named_parameters())
    decayed, free = ([parameters[name] for name in group] for group in names)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
