"""Offload: where the model states are, and what is written for it."""

import dataclasses

import pytest

from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import (
    largest_share,
    offload_devices,
    offloaded_bytes,
    optimizer_buffers,
    swap_folder,
)
from dsllm.mesh import Mesh
from tests.helpers.tiny import parameter_shapes, tiny_run

NVME = {"device": "nvme", "nvme_path": "/nvme"}
READ, WRITE = (f"zero_optimization.offload_optimizer.pipeline_{what}" for what in ("read", "write"))


def test_devices():
    assert offload_devices({"stage": 3}) == ("none", "none")
    assert offload_devices({"offload_optimizer": NVME, "offload_param": {"device": "cpu"}}) == ("nvme", "cpu")


def test_reading_ahead_and_writing_behind_take_buffers_of_their_own():
    asked = [{}, {READ: False}, {READ: True}, {WRITE: True}, {READ: True, WRITE: True}]
    assert [optimizer_buffers(values) for values in asked] == [4, 4, 8, 8, 12]


def test_two_runs_have_two_swap_folders():
    run = tiny_run()
    other = dataclasses.replace(run, run=dataclasses.replace(run.run, directory="elsewhere/tiny"))
    assert swap_folder("/nvme", run) == swap_folder("/nvme", run)
    assert swap_folder("/nvme", run) != swap_folder("/nvme", other)
    assert swap_folder("/nvme", run).parent == swap_folder("/nvme", other).parent


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_a_buffer_holds_a_ranks_share_of_the_largest_parameter(data_size):
    largest = max(int.__mul__(*s) for s in parameter_shapes().values() if len(s) == 2)
    share = largest_share(tiny_run(), Layout(mesh=Mesh(data=data_size), device="cpu", precision="fp32"))
    assert largest <= share * data_size < largest + data_size


@pytest.mark.parametrize(
    "zero, precision, device, host, nvme",
    [
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "fp32", 4, 12, 0),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, "bf16", 2 + 2, 9, 0),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "fp32", 2, 10, 0),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, "bf16", 0, 11, 0),
        ({"stage": 3, "offload_optimizer": NVME, "offload_param": NVME}, "fp32", 0, 2, 10),
    ],
)
def test_bytes_per_parameter_on_two_ranks(zero, precision, device, host, nvme):
    """Counted, tensor by tensor, on two ranks with accumulation (docs/training.md)."""
    found = offloaded_bytes(zero, 1000, precision, 2)
    assert (found.device, found.host, found.nvme) == (device * 1000, host * 1000, nvme * 1000)
