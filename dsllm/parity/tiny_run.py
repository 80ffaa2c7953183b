"""The run that is compared: a small model on fixed tokens, made so that faults show and nothing divides evenly."""

from collections.abc import Sequence

import torch

from dsllm.batches import MicroBatch
from dsllm.config.data import DataConfig
from dsllm.config.model import ModelConfig
from dsllm.config.optimizer import AdamWConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.config.train import LossScaleConfig, TrainConfig
from dsllm.parity.combinations import Combination

NUM_STEPS = 6
SEQUENCE_LENGTH = 16
MICRO_BATCH_SEQUENCES = 2
CLIPPING = 0.75
"""Below every gradient norm of the run, so that it bites at each step, each time by another factor."""
LOSS_SCALE_POWER = 10
"""fp16's loss scale starts at 2 to this power: the run neither overflows nor loses gradients to underflow."""

OPTIMIZER = AdamWConfig(
    learning_rate=4e-3,
    # Adam divides a wrong factor on all gradients out again; with an epsilon as large as a gradient it cannot, and
    # a gradient that is nearly zero cannot turn a rounding error into a step of full size
    epsilon=1e-3,
    weight_decay=3.0,  # one decay too many moves the weights by a few percent of all that training moves them
)


def learning_rate(step: int) -> float:
    """Learning rate of a step: it changes, so that a step too far is seen."""
    return OPTIMIZER.learning_rate * min(1.0, (step + 1) / 3)


def model_of(combination: Combination) -> ModelConfig:
    """Two layers, 3 heads of 10 in a width of 28, an odd MLP, biases that are not decayed."""
    return ModelConfig(
        num_layers=2,
        hidden_size=28,
        num_heads=3,
        num_kv_heads=1,
        head_size=10,
        mlp_size=67,
        vocab_size=101,
        initial_std=0.1,
        attention_bias=True,
        tie_embeddings=combination.tied,
    )


def run_of(combination: Combination, seed: int) -> RunConfig:
    """The combination's run, as `dsllm train` would read it from a file."""
    batch = MICRO_BATCH_SEQUENCES * combination.num_micro_batches
    dynamic = combination.loss_scale == "dynamic"
    return RunConfig(
        run=RunSection(name="parity", directory="runs/parity", seed=seed),
        data=DataConfig(sequence_length=SEQUENCE_LENGTH),
        model=model_of(combination),
        train=TrainConfig(
            total_tokens=NUM_STEPS * batch * SEQUENCE_LENGTH,
            global_batch_sequences=batch,
            micro_batch_sequences=MICRO_BATCH_SEQUENCES,
            precision=combination.precision,
            gradient_clipping=CLIPPING if combination.clipping else 0.0,
            optimizer=OPTIMIZER,
            loss_scale=LossScaleConfig(
                static=0.0 if dynamic else 2.0**LOSS_SCALE_POWER, initial_power=LOSS_SCALE_POWER, window_steps=2
            ),
            activation_checkpointing=combination.activation_checkpointing,
        ),
    )


def samples(combination: Combination, seed: int, step: int, numbers: Sequence[int]) -> MicroBatch:
    """These samples of a step's global batch: noisy walks over the vocabulary, so that there is something to learn."""
    rows, weights = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(hash((seed, step, number)) % 2**63)
        walk = torch.randint(0, 4, (SEQUENCE_LENGTH + 1,), generator=generator).cumsum(0)
        rows.append((walk * 7 + number) % 101)
        # every other sample counts for far less: a mean of the ranks' means is then not the mean over tokens
        share = 0.2 if number % 2 else 0.9
        weights.append((torch.rand(SEQUENCE_LENGTH, generator=generator) < share).float())
    tokens = torch.stack(rows)
    counting = torch.stack(weights) if combination.masked else None
    return MicroBatch(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=counting)


def micro_batches(combination: Combination, seed: int, step: int, rank: int) -> list[MicroBatch]:
    """The micro-batches of one rank: every W-th sample of the global batch."""
    size, each = combination.world_size, MICRO_BATCH_SEQUENCES
    own = range(rank, combination.num_micro_batches * each, size)
    return [samples(combination, seed, step, own[i : i + each]) for i in range(0, len(own), each)]
