"""The held-out loss is the mean over all counted tokens, however they are batched and spread over ranks."""

import math
from dataclasses import dataclass

import pytest
import torch

from dsllm.evaluate.perplexity import HeldOutLoss, validation_loss
from dsllm.objectives import ModelOutput

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    documents: torch.Tensor | None = None


class Batches(list):
    text_bytes = 40


def model(inputs: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> ModelOutput:
    """Each token's loss is its target."""
    return ModelOutput(losses=targets.float(), auxiliary={})


def batch(targets: list[int], weights: list[float] | None) -> Batch:
    tensor = torch.tensor([targets])
    return Batch(tensor, tensor, None if weights is None else torch.tensor([weights]))


def test_tokens_count_by_their_weights_and_not_batches():
    batches = Batches([batch([1, 2, 3, 4], None), batch([10, 50, 50, 50], [1, 0, 0, 0])])
    found = validation_loss(model, batches, CPU)
    assert found == HeldOutLoss(loss=(1 + 2 + 3 + 4 + 10) / 5, num_tokens=5, text_bytes=40)
    assert found.perplexity == pytest.approx(math.exp(4))
    assert found.bits_per_byte == pytest.approx(20 / math.log(2) / 40)


def test_sums_of_all_ranks_are_joined():
    found = validation_loss(model, Batches([batch([1, 3], None)]), CPU, lambda numbers: [n + 6 for n in numbers])
    assert found == HeldOutLoss(loss=10 / 8, num_tokens=8, text_bytes=40)


def test_without_known_text_there_are_no_bits_per_byte():
    assert HeldOutLoss(loss=1.0, num_tokens=5, text_bytes=None).bits_per_byte is None


def test_a_hopeless_loss_is_still_a_number():
    assert math.isfinite(HeldOutLoss(loss=1e6, num_tokens=1, text_bytes=1).perplexity)
