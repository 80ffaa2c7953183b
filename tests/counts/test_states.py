"""Model states by table; tests/engine/test_memory.py measures them at every moment of a step."""

import dataclasses
import itertools

import pytest

from dsllm.config.train import PRECISIONS, Precision
from dsllm.counts import ModelStates, checkpoint_bytes, model_states
from dsllm.parameters import parameter_table
from tests.helpers.models import LLAMA


@pytest.mark.parametrize(
    ("stage", "precision", "fp32_gradients", "bytes_per_parameter"),
    [
        (0, "fp32", True, 16),
        # fp32 in DeepSpeed itself: 12, 12 and 10, as it keeps the weights twice, which engine/wrappers/shared_masters.py avoids
        (1, "fp32", True, 10),
        (2, "fp32", True, 10),
        (3, "fp32", True, 8),
        (1, "bf16", True, 14),
        (2, "bf16", True, 10),
        (1, "bf16", False, 9),
        (3, "bf16", False, 8),
        (0, "fp16", False, 16),
    ],
)
def test_model_states_as_measured_on_two_ranks(stage, precision, fp32_gradients, bytes_per_parameter):
    # Distinct tensor storages of DeepSpeed 0.19.8 after a backward pass, in bytes per parameter, buckets left out.
    assert model_states(1000, stage, precision, 2, fp32_gradients).most == 1000 * bytes_per_parameter


def by_derivation(
    n: int, stage: int, precision: Precision, size: int, fp32_gradients: bool, accumulation: int
) -> ModelStates:
    """The same bytes derived from what DeepSpeed keeps, part by part: a judge independent of the table."""
    sixteen = precision in ("bf16", "fp16")
    weights, masters, moments = (2, 4, 8) if sixteen else (4, 4, 8)
    gradients = weights
    summed = 4 if fp32_gradients or not sixteen else 2

    def held(whole: int, shared: int) -> int:
        return whole * n + -(-shared * n // size)

    if stage == 3:
        shared = (weights + masters if sixteen else masters) + summed
        most = held(0, shared + moments)
        return ModelStates(after_init=held(0, shared), while_accumulating=most, after_backward=most, after_step=most)
    if stage == 0:
        rest, parts = weights + (masters if sixteen else 0) + moments, 0
        init, summing, summed_up = held(rest - moments, 0), gradients, held(rest + gradients, 0)
    else:
        rest, parts = weights, moments + (masters if sixteen else 0)
        init, summing, summed_up = held(weights, parts - moments), gradients, held(rest, parts + summed)
    if stage == 1 and precision == "bf16" and summed == 4:
        rest, init, summed_up = rest + 4, init + 4 * n, held(rest + 4 + gradients, parts)
    elif stage == 1 and sixteen and summed == 4:
        summing, summed_up = 4, held(rest + 4, parts)
    adding = summed_up if stage == 2 or accumulation == 1 else held(rest + summing, parts)
    return ModelStates(
        after_init=init, while_accumulating=adding, after_backward=summed_up, after_step=held(rest, parts)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_table_equals_its_derivation(stage: int, precision: Precision):
    for n, size, fp32_gradients, accumulation in itertools.product((1, 1001), (1, 2, 3), (True, False), (1, 2)):
        arguments = (n, stage, precision, size, fp32_gradients, accumulation)
        assert model_states(*arguments) == by_derivation(*arguments), arguments


def test_a_checkpoint_has_weights_and_the_optimizer_state_of_what_is_trained():
    table = parameter_table(LLAMA, 64)
    total = sum(parameter.num_elements for parameter in table)
    assert checkpoint_bytes(table) == 12 * total  # fp32 weights and two moments
    assert checkpoint_bytes(table, num_state_tensors=1) == 8 * total
    frozen = tuple(dataclasses.replace(parameter, trainable=False) for parameter in table)
    assert checkpoint_bytes(frozen) == 4 * total
