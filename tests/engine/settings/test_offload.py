"""Offload and ZeRO++ in the DeepSpeed JSON: written out where they are used, all that is wrong in one error otherwise."""

from typing import Any

import pytest
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from dsllm.engine.settings.final_config import Layout, final_config
from dsllm.engine.settings.offload import OPTIMIZER_KEYS, PARAM_KEYS, REFUSED, offloaded_bytes
from dsllm.errors import ConfigError
from tests.helpers.tiny import TABLE, tiny_run

CPU = Layout(world_size=2, device="cpu", precision="fp32")
GPUS = Layout(world_size=16, device="cuda", precision="bf16", num_nodes=2)
NVME = {"device": "nvme", "nvme_path": "/nvme"}


def zero_of(zero: dict[str, Any], layout: Layout = CPU, **top: Any) -> dict[str, Any]:
    config = tiny_run(global_batch_sequences=2 * layout.world_size)
    return final_config(config, {"zero_optimization": zero, **top}, layout)


def problems(zero: Any, layout: Layout = CPU, **top: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        zero_of(zero, layout, **top)
    return caught.value.problems


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_cpu_is_written_out_and_keeps_torchs_adamw(stage):
    final = zero_of({"stage": stage, "offload_optimizer": {"device": "cpu"}})
    assert final["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert final["zero_force_ds_cpu_optimizer"] is False and "aio" not in final


def test_without_offload_nothing_is_added():
    final = zero_of({"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": "auto"})
    assert not {"offload_optimizer", "offload_param", "zero_hpz_partition_size"} & set(final["zero_optimization"])
    assert "zero_force_ds_cpu_optimizer" not in final


def test_nvme_is_written_out():
    final = zero_of({"stage": 3, "offload_optimizer": NVME, "offload_param": NVME | {"max_in_cpu": 0}})
    optimizer, param = (final["zero_optimization"][key] for key in ("offload_optimizer", "offload_param"))
    assert optimizer["buffer_count"] == 4  # what AdamW works on at once
    assert optimizer["nvme_path"] == param["nvme_path"] and optimizer["nvme_path"].startswith("/nvme/dsllm-tiny-")
    largest = max(parameter.num_elements for parameter in TABLE)
    assert param["buffer_size"] == -(-largest // 2)  # a rank's share of the largest parameter
    assert final["zero_optimization"]["stage3_max_reuse_distance"] == 0
    assert final["aio"]["block_size"] == 2**20 and final["aio"]["use_gds"] is False
    piped = zero_of({"stage": 3, "offload_optimizer": NVME | {"pipeline_read": True, "pipeline_write": True}})
    assert piped["zero_optimization"]["offload_optimizer"]["buffer_count"] == 12


def test_the_tables_name_deepspeeds_keys():
    assert set(OPTIMIZER_KEYS) | set(REFUSED) == set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
    assert set(PARAM_KEYS) == set(DeepSpeedZeroOffloadParamConfig.model_fields)


def test_everything_that_is_wrong_in_one_error():
    zero = {
        "stage": 3,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": "relative",
            "buffer_count": 3,
            "pin_memory": 1,
            "ratio": 0.5,
            "fast_init": True,
            "super_offload": True,
            "cpuadam_cores_perc": 0.8,
            "bufer_count": 4,
        },
        "offload_param": {"device": "disk", "buffer_size": 1.5, "max_in_cpu": -1},
        "zero_hpz_partition_size": 3,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    aio = {"block_size": 1000, "queue_depth": 0, "use_gds": True, "thread_count": 1}
    found = problems(zero, aio=aio, zero_force_ds_cpu_optimizer=True)
    expected = [
        "offload_optimizer.nvme_path: must be absolute",
        "offload_optimizer.buffer_count: 3 is too few",
        "offload_optimizer.pin_memory: must be true or false, but it is 1",
        "offload_optimizer.ratio: a part of the states on the device needs DeepSpeed's own CPU Adam",
        "offload_optimizer.fast_init: it shortens",
        "offload_optimizer.super_offload: it steps in processes of its own",
        "offload_optimizer.cpuadam_cores_perc: it belongs to super_offload",
        "offload_optimizer.bufer_count: unknown key; did you mean 'buffer_count'?",
        "offload_param.device: must be one of none, cpu, nvme, but it is 'disk'",
        "offload_param.buffer_size: must be a whole number, but it is 1.5",
        "offload_param.max_in_cpu: must be a whole number, but it is -1",
        "zero_hpz_partition_size: 3 does not divide the 2 ranks of a node",
        "zero_quantized_weights: its kernels are CUDA's",
        "zero_quantized_gradients: on one node DeepSpeed accepts it and leaves it out silently",
        "zero_quantized_gradients: its kernels are CUDA's",
        "aio.block_size: direct I/O works in whole pages",
        "aio.queue_depth: must be at least 1, but it is 0",
        "aio.use_gds: GPUDirect Storage is not proven here",
        "aio.thread_count: unknown key",
        "zero_force_ds_cpu_optimizer: it asks for DeepSpeed's own CPU Adam",
    ]
    for words in expected:
        assert any(words in problem for problem in found), words
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    "zero, words",
    [
        ({"offload_optimizer": {"device": "cpu"}}, "stage 0 keeps the optimizer's states on the device"),
        ({"stage": 2, "offload_optimizer": NVME}, "nvme needs stage 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "needs stage 3"),
        ({"stage": 3, "offload_param": NVME}, "the optimizer's states, which are larger, stay in memory"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme_path: is missing"),
        ({"stage": 3, "offload_optimizer": True}, "must be an object"),
        (
            {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME, "stage3_max_reuse_distance": 10**9},
            "'Not enough buffers'",
        ),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "ZeRO++ needs stage 3"),
        ({"stage": 3, "mics_shard_size": 2}, "MiCS was removed"),
        ({"stage": 3, "cpu_offload": True}, "removed from DeepSpeed; use offload_optimizer"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "no weight is frozen"),
    ],
)
def test_one_thing_wrong(zero, words):
    (text,) = problems(zero)
    assert words in text


def test_aio_without_nvme_would_be_ignored():
    assert "nothing is offloaded to NVMe" in problems({"stage": 3}, aio={"queue_depth": 8})[0]


def test_hpz_cannot_go_with_parameters_on_nvme():
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "offload_optimizer": NVME, "offload_param": NVME}
    assert "cannot put the second copy of the weights on NVMe" in problems(zero)[0]


def test_zeropp_between_nodes():
    zero = {
        "stage": 3,
        "zero_hpz_partition_size": "auto",
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    final = zero_of(zero, GPUS)["zero_optimization"]
    assert final["zero_hpz_partition_size"] == 8  # the ranks of a node
    assert final["zero_quantized_weights"] and final["zero_quantized_gradients"]
    one_node = Layout(world_size=8, device="cuda", precision="bf16")
    assert "silently" in problems(zero, one_node)[0]


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
