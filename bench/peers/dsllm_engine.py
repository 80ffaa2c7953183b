"""dsllm's engine for benchmarks on made-up tokens, assembled as in training."""

from typing import Any

from bench.peers.common import micro_batch
from bench.workloads import Workload
from dsllm.config.data import DataConfig
from dsllm.config.model import ModelConfig
from dsllm.config.optimizer import AdamWConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.config.train import Precision, TrainConfig
from dsllm.engine.build import Engine
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.session.assembly import ready_engine


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
            optimizer=AdamWConfig(learning_rate=shape.learning_rate),
        ),
    )


def build(shape: Workload, world: World, stage: int, precision: Precision, seed: int = 1234, **zero: Any) -> Engine:
    """The engine at its initial weights.

    Args:
        zero: keys of the DeepSpeed JSON's zero_optimization to set.
    """
    config = run_of(shape, seed)
    given = read_deepspeed_json(f"ds_configs/zero{stage}.json")
    given["zero_optimization"] |= zero
    layout = Layout(mesh=world.mesh, device=world.device.type, precision=precision)
    return ready_engine(config, final_config(config, given, layout), precision, world)
