"""The loss per token, weighted or not, against torch's cross-entropy."""

import pytest
import torch
from torch.nn import functional

from dsllm.batches import MicroBatch
from dsllm.objectives import ModelOutput, TokenLoss

B, T, V = 2, 5, 7


def batch(weights: torch.Tensor | None = None) -> tuple[torch.Tensor, MicroBatch, ModelOutput]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, V, generator=generator)
    inputs, targets = torch.randint(V, (2, B, T), generator=generator)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    return logits, MicroBatch(inputs=inputs, targets=targets, weights=weights), ModelOutput(losses, {})


def test_every_target_counts_one():
    logits, one, output = batch()
    objective = TokenLoss()
    assert objective.counts_every_target and objective.count(one) == B * T
    mean = objective(output, one).loss_sum / objective.count(one)
    torch.testing.assert_close(mean, functional.cross_entropy(logits.flatten(0, 1), one.targets.flatten()))


def test_masked_targets_do_not_count():
    """As torch's ignore_index does it."""
    mask = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    logits, one, output = batch(mask)
    objective = TokenLoss(weighted=True)
    assert not objective.counts_every_target and objective.count(one) == 4
    targets = one.targets.masked_fill(mask == 0, -100)
    mean = objective(output, one).loss_sum / objective.count(one)
    torch.testing.assert_close(mean, functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_weights_cannot_be_overlooked():
    _, one, _ = batch(torch.ones(B, T))
    with pytest.raises(AssertionError, match="counts every target"):
        TokenLoss().count(one)
