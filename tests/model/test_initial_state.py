"""What a new run starts from: weights by region, and no optimizer state."""

import torch

from dsllm.model.initial import initial_value
from dsllm.model.initial_state import InitialValues, WeightsOnly
from dsllm.parameters import parameter_table
from dsllm.slices import WEIGHTS, Box, Region, whole
from tests.helpers.models import CONTEXT, LLAMA

TABLE = parameter_table(LLAMA, CONTEXT)
EMBEDDING = TABLE[0]  # [256, 48]


def test_initial_values_are_read_region_by_region():
    state, values = InitialValues(TABLE, seed=3), initial_value(EMBEDDING, 3)
    flat = state.read("embed.weight", WEIGHTS, Region(whole(EMBEDDING.shape), 1000, 2000))
    assert torch.equal(flat, values.flatten()[1000:2000])
    half = state.read("embed.weight", WEIGHTS, Region(Box((128, 0), (256, 48)), 10, 100))
    assert torch.equal(half, values[128:].flatten()[10:100])


def test_a_new_run_has_no_optimizer_state():
    state = InitialValues(TABLE, seed=3)
    assert state.keys("embed.weight") == (WEIGHTS,) and not state.scalars("embed.weight")


class Trained(InitialValues):
    """A state with a moment."""

    def keys(self, name: str) -> tuple[str, ...]:
        return (WEIGHTS, "moment")

    def scalars(self, name: str) -> dict[str, float]:
        return {"step": 5.0}


def test_of_another_state_the_weights_alone_are_taken():
    trained = Trained(TABLE, seed=3)
    state, region = WeightsOnly(trained), Region(whole(EMBEDDING.shape), 0, 50)
    assert torch.equal(state.read("embed.weight", WEIGHTS, region), trained.read("embed.weight", WEIGHTS, region))
    assert state.keys("embed.weight") == (WEIGHTS,) and not state.scalars("embed.weight")
