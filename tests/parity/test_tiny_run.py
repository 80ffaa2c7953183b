"""The run that parity compares: its samples, how the ranks divide them, and its config."""

import pytest
import torch

from dsllm.parity.combinations import Combination
from dsllm.parity.tiny_run import MICRO_BATCH_SEQUENCES, NUM_STEPS, learning_rate, micro_batches, run_of, samples


def test_the_ranks_divide_the_global_batch_without_a_rest():
    row = Combination(world_size=4, accumulation=3)
    number = row.num_micro_batches * MICRO_BATCH_SEQUENCES
    whole = samples(row, 7, 1, range(number)).inputs
    parts = [batch.inputs for rank in range(4) for batch in micro_batches(row, 7, 1, rank)]
    assert all(len(part) == MICRO_BATCH_SEQUENCES for part in parts) and len(parts) == row.num_micro_batches
    assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, whole.tolist()))


def test_samples_depend_on_seed_step_and_number_only():
    def inputs(row: Combination, seed: int, step: int, number: int) -> torch.Tensor:
        return samples(row, seed, step, [number]).inputs

    same = inputs(Combination(), 7, 0, 3)
    assert torch.equal(same, inputs(Combination(world_size=4, precision="bf16"), 7, 0, 3))
    for seed, step, number in ((8, 0, 3), (7, 1, 3), (7, 0, 4)):
        assert not torch.equal(same, inputs(Combination(), seed, step, number))


def test_targets_are_the_next_tokens():
    batch = samples(Combination(), 7, 0, [0, 1])
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1]) and batch.weights is None


def test_a_mask_counts_different_numbers_of_tokens_on_the_ranks():
    row = Combination(masked=True, world_size=2)
    counts = [sum(float(batch.weights.sum()) for batch in micro_batches(row, 7, 0, rank)) for rank in (0, 1)]
    assert min(counts) > 0 and max(counts) > 2 * min(counts)


@pytest.mark.parametrize("row", [Combination(), Combination(world_size=4, accumulation=3, precision="fp16", stage=1)])
def test_the_config_fits_the_row(row: Combination):
    config = run_of(row, seed=7)
    assert config.num_steps == NUM_STEPS and config.train.precision == row.precision
    accumulation = config.train.global_batch_sequences / (config.train.micro_batch_sequences * row.world_size)
    assert accumulation == row.accumulation


def test_the_learning_rate_changes_between_steps_so_that_a_step_too_far_is_seen():
    assert learning_rate(0) < learning_rate(1) < learning_rate(2) == learning_rate(NUM_STEPS)
