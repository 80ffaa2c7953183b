"""dsllm's engine over made-up tokens, for the benches that look inside it: the product's own parts, joined as it does."""

from dataclasses import dataclass
from typing import Any

import torch

from bench.peers.common import micro_batch
from bench.workloads import Workload
from dsllm.config.data import DataConfig
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.config.train import OptimizerConfig, TrainConfig
from dsllm.engine.build import Engine, build_engine
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.engine.state import load_state
from dsllm.mesh import Mesh
from dsllm.model.initial import decay_groups
from dsllm.model.initial_state import InitialValues
from dsllm.model.transformer import Transformer, parameter_shapes


@dataclass(frozen=True)
class Batch:
    """What a step takes: inputs and targets [b, T], all of which count, of one document."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None
    documents: torch.Tensor | None = None


def run_of(shape: Workload, seed: int) -> RunConfig:
    """The workload as a run of dsllm."""
    return RunConfig(
        run=RunSection(name="bench", directory="", seed=seed),
        data=DataConfig(sequence_length=shape.sequence_length),
        model=ModelConfig(**shape.dsllm_model),
        train=TrainConfig(
            global_batch_sequences=shape.global_batch_sequences,
            micro_batch_sequences=micro_batch(shape),
            gradient_clipping=shape.gradient_clipping,
            optimizer=OptimizerConfig(learning_rate=shape.learning_rate),
        ),
    )


def build(
    shape: Workload, world: World, stage: int, compute_dtype: torch.dtype | None, seed: int = 1234, **zero: Any
) -> Engine:
    """The engine in fp32, its weights at their initial values.

    Args:
        compute_dtype: of the layers; nothing: that of the parameters.
        zero: keys of the DeepSpeed JSON's zero_optimization to set.
    """
    config = run_of(shape, seed)
    given = read_deepspeed_json(f"ds_configs/zero{stage}.json")
    given["zero_optimization"] |= zero
    layout = Layout(mesh=Mesh(data=world.size), device=world.device.type, precision="fp32_compute_bf16")
    engine = build_engine(
        lambda: Transformer(config.model, config.context_length, compute_dtype),
        decay_groups,
        config.train,
        "fp32_compute_bf16",
        final_config(config, given, layout),
        world,
    )
    shapes = parameter_shapes(config.model, config.context_length)
    load_state(engine, InitialValues(config.model, shapes, seed))
    return engine
