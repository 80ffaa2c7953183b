"""The tiny run that the engine's tests share: a small Llama-shaped model on fixed random tokens."""

import dataclasses
from typing import Any

import torch

from dsllm.config.data import DataConfig
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.config.train import OptimizerConfig, TrainConfig
from dsllm.engine.build import Engine, build_engine
from dsllm.engine.instruments.fp16_on_cpu import fp16_on_cpu
from dsllm.engine.processes.device import compute_dtype
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.state import load_state
from dsllm.mesh import Mesh
from dsllm.model.initial import decay_groups, initial_value
from dsllm.model.recompute import Recompute
from dsllm.model.transformer import Transformer
from dsllm.slices import WEIGHTS, Region

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


def tiny_run(**train: Any) -> RunConfig:
    """A run of that model: fp32, accumulation over 2 micro-batches on 2 ranks, clipping that bites."""
    settings = {
        "total_tokens": 20 * GLOBAL_BATCH * SEQUENCE_LENGTH,
        "global_batch_sequences": GLOBAL_BATCH,
        "micro_batch_sequences": 2,
        "precision": "fp32",
        "gradient_clipping": 1.0,
        "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.1),
    } | train
    return RunConfig(
        run=RunSection(name="tiny", directory="runs/tiny", seed=SEED),
        data=DataConfig(sequence_length=SEQUENCE_LENGTH),
        model=MODEL,
        train=TrainConfig(**settings),
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs and targets [b, T], all of which count."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None
    documents: torch.Tensor | None = None


def sample(number: int) -> torch.Tensor:
    """Tokens [T + 1] of a sample: a noisy walk, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + number)
    steps = torch.randint(0, 4, (SEQUENCE_LENGTH + 1,), generator=generator)
    return (steps.cumsum(0) * 7 + number) % MODEL.vocab_size


def micro_batches(config: RunConfig, step: int, rank: int, world_size: int) -> list[Batch]:
    """This rank's micro-batches of a step."""
    first, batch, micro = step * GLOBAL_BATCH, config.train.global_batch_sequences, config.train.micro_batch_sequences
    own = [sample(first + i) for i in range(rank, batch, world_size)]
    rows = [torch.stack(own[i : i + micro]) for i in range(0, len(own), micro)]
    return [Batch(r[:, :-1], r[:, 1:]) for r in rows]


class InitialValues:
    """The model's initial values as a state to load."""

    def __init__(self, config: RunConfig, shapes: dict[str, tuple[int, ...]]):
        self.config, self.shapes = config, shapes

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """See StateReader."""
        return region.of(initial_value(name, self.shapes[name], self.config.model, self.config.run.seed))

    def keys(self, name: str) -> tuple[str, ...]:
        """See StateReader."""
        return (WEIGHTS,)

    def scalars(self, name: str) -> dict[str, float]:
        """See StateReader."""
        return {}


def parameter_shapes(config: ModelConfig = MODEL) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters, by name."""
    with torch.device("meta"):
        model = Transformer(config, SEQUENCE_LENGTH)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def tiny_model(config: RunConfig) -> Transformer:
    """The run's model, as it is carried out."""
    assert config.train.precision != "auto"
    recompute = Recompute(what=config.train.activation_checkpointing, offload=config.train.activation_offload)
    model = Transformer(config.model, SEQUENCE_LENGTH, compute_dtype(config.train.precision), recompute)
    if config.train.compile:
        model.compile_layers()
    return model


def tiny_engine(
    world: World, config: RunConfig, stage: int, reader: Any = None, device: str = "cpu", **zero: Any
) -> Engine:
    """The tiny run's engine with its state loaded: the initial values, unless a reader is given."""
    precision = config.train.precision
    assert precision != "auto"
    # buckets and thresholds so small that parameters are really cut and spread over several of them
    small = {"reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 200, "sub_group_size": 20_000}
    given = {"zero_optimization": {"stage": stage, **(small if stage else {}), **zero}}
    final = final_config(config, given, Layout(mesh=Mesh(data=world.size), device=device, precision=precision))
    with fp16_on_cpu(precision):
        engine = build_engine(lambda: tiny_model(config), decay_groups, config.train, precision, final, world)
    load_state(engine, reader or InitialValues(config, parameter_shapes(config.model)))
    return engine
