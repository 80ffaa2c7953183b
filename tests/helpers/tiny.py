"""The tiny run that the engine's tests share: a small Llama-shaped model on fixed random tokens."""

from typing import Any

import torch

from dsllm.batches import MicroBatch
from dsllm.config.data import DataConfig
from dsllm.config.model import ModelConfig
from dsllm.config.optimizer import AdamWConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.config.train import TrainConfig
from dsllm.engine.build import Engine
from dsllm.engine.instruments.fp16_on_cpu import fp16_on_cpu
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.step import StepResult, take_step
from dsllm.model.initial_state import InitialValues
from dsllm.model.kernels import TORCH
from dsllm.model.transformer import Transformer
from dsllm.objectives import TokenLoss
from dsllm.parameters import parameter_table
from dsllm.session.assembly import build_model, ready_engine

SEQUENCE_LENGTH = 16
GLOBAL_BATCH = 8
SEED = 7

# nothing divides evenly: 3 x 20 heads in a width of 56, and an odd MLP
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=56,
    num_heads=3,
    num_kv_heads=1,
    head_size=20,
    mlp_size=131,
    vocab_size=250,
    initial_std=0.05,
)

TABLE = parameter_table(MODEL, SEQUENCE_LENGTH)

# so small that parameters are really cut and spread over several of them
SMALL_BUCKETS = {"reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 200, "sub_group_size": 20_000}


def tiny_run(**train: Any) -> RunConfig:
    """A run of that model: fp32, accumulation over 2 micro-batches on 2 ranks, clipping that bites."""
    settings = {
        "total_tokens": 20 * GLOBAL_BATCH * SEQUENCE_LENGTH,
        "global_batch_sequences": GLOBAL_BATCH,
        "micro_batch_sequences": 2,
        "precision": "fp32",
        "gradient_clipping": 1.0,
        "optimizer": AdamWConfig(learning_rate=1e-3, weight_decay=0.1),
    } | train
    return RunConfig(
        run=RunSection(name="tiny", directory="runs/tiny", seed=SEED),
        data=DataConfig(sequence_length=SEQUENCE_LENGTH),
        model=MODEL,
        train=TrainConfig(**settings),
    )


def sample(number: int) -> torch.Tensor:
    """Tokens [T + 1] of a sample: a noisy walk, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + number)
    steps = torch.randint(0, 4, (SEQUENCE_LENGTH + 1,), generator=generator)
    return (steps.cumsum(0) * 7 + number) % MODEL.vocab_size


def micro_batches(config: RunConfig, step: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    first, batch, micro = step * GLOBAL_BATCH, config.train.global_batch_sequences, config.train.micro_batch_sequences
    own = [sample(first + i) for i in range(rank, batch, world_size)]
    rows = [torch.stack(own[i : i + micro]) for i in range(0, len(own), micro)]
    return [MicroBatch(inputs=r[:, :-1], targets=r[:, 1:]) for r in rows]


def first_state(config: RunConfig) -> InitialValues:
    """The model's initial values as a state to load."""
    return InitialValues(parameter_table(config.model, SEQUENCE_LENGTH), config.run.seed)


def tiny_model(config: RunConfig) -> Transformer:
    """The run's model as it is trained, outside an engine."""
    assert config.train.precision != "auto"
    return build_model(config, config.train.precision, TORCH)


def tiny_engine(
    world: World, config: RunConfig, stage: int, reader: Any = None, device: str = "cpu", **zero: Any
) -> Engine:
    """The tiny run's engine with its state loaded: the initial values, unless a reader is given."""
    precision = config.train.precision
    assert precision != "auto"
    given = {"zero_optimization": {"stage": stage, **(SMALL_BUCKETS if stage else {}), **zero}}
    final = final_config(config, given, Layout(mesh=world.mesh, device=device, precision=precision))
    with fp16_on_cpu(precision):
        return ready_engine(config, final, precision, world, reader)


def tiny_step(engine: Engine, config: RunConfig, step: int, **more: Any) -> StepResult:
    """One optimizer step of the tiny run, its seed the step's number."""
    batches = micro_batches(config, step, engine.world.data_rank, engine.world.data_size)
    return take_step(engine, batches, TokenLoss(), seed=step, **more)
