"""Rules between several keys, the run and the layout."""

from typing import Any

import pytest

from dsllm.engine.settings.check import read_values
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.rules import check_rules
from dsllm.mesh import Mesh

CPU = Layout(mesh=Mesh(data=2), device="cpu", precision="fp32")
GPU = Layout(mesh=Mesh(data=2), device="cuda", precision="bf16")
FP16 = Layout(mesh=Mesh(data=2), device="cuda", precision="fp16")
CPU_FP16 = Layout(mesh=Mesh(data=2), device="cpu", precision="fp16")
GPUS = Layout(mesh=Mesh(data=16), device="cuda", precision="bf16", ranks_by_node=(8, 8))
NVME = {"device": "nvme", "nvme_path": "/nvme"}


def broken(given: dict[str, Any], layout: Layout = CPU) -> list[str]:
    """The rules that a JSON breaks whose keys are right by themselves."""
    values, problems = read_values(given)
    assert not problems
    return list(check_rules(values, layout))


def test_fp16_at_stage_0_and_on_cpu():
    on_cpu, at_stage_0 = broken({}, CPU_FP16)
    assert "no fp16" in on_cpu and "never applied" in at_stage_0
    assert len(broken({}, FP16)) == 1 and not broken({"zero_optimization": {"stage": 1}}, FP16)


@pytest.mark.parametrize(
    ("given", "layout", "says"),
    [
        ({"communication_data_type": "bf16"}, FP16, ["bf16 keeps 3 bits less than fp16: use fp32 or fp16"]),
        ({"communication_data_type": "fp16"}, GPU, ["fp16 overflows where bf16 does not: use fp32 or bf16"]),
        ({"communication_data_type": "fp16"}, CPU, ["fp16 with train.precision fp32 would overflow: use fp32 or bf16"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, FP16, ["would add up fp16 gradients in a third type"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, CPU, ["would round fp32 gradients to bf16 at every addition"]),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 0}},
            GPU,
            ["at ZeRO stage 0: DeepSpeed has no such optimizer there"],
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"},
            CPU_FP16,
            ["no fp16", "third type", "bf16 keeps 3 bits less"],
        ),
        ({"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp32"}, GPU, []),
        ({"communication_data_type": "bf16"}, CPU, []),
    ],
)
def test_wrong_dtypes_are_refused_with_all_reasons_at_once(given, layout, says):
    found = broken({"zero_optimization": {"stage": 2}} | given, layout)
    assert len(found) == len(says), found
    assert all(any(text in problem for problem in found) for text in says), found


@pytest.mark.parametrize(
    "given",
    [
        {"communication_data_type": "int8"},
        {"communication_data_type": ["fp32"]},
        {"data_types": {"grad_accum_dtype": "float32"}},
    ],
)
def test_a_dtype_that_is_none_is_named(given):
    (problem,) = read_values(given)[1]
    assert "must be 'fp32', 'bf16' or 'fp16', but it is" in problem


@pytest.mark.parametrize("given", [{"data_types": {"grad_accum_dtype": "fp8"}}, {"fp8": {"enabled": True}}])
def test_fp8_is_refused_with_its_reason(given):
    assert "fp8 is refused until a GPU run" in read_values(given)[1][0]


@pytest.mark.parametrize("asked", [{"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}])
def test_division_before_the_sum_needs_all_reduce(asked):
    (name,) = asked
    assert "would divide twice" in broken({"zero_optimization": {"stage": 3}} | asked)[0]
    for scatter in ({"reduce_scatter": True}, {}):
        found = broken({"zero_optimization": {"stage": 2} | scatter} | asked, GPU)
        assert found == [
            f"deepspeed JSON: {name}: works with all-reduce only: set zero_optimization.reduce_scatter to false"
        ]
    assert not broken({"zero_optimization": {"stage": 2, "reduce_scatter": False}} | asked, GPU)
    assert not broken({"zero_optimization": {"stage": 2}} | asked, CPU)  # there false is what is written
    assert not broken({"zero_optimization": {"stage": 0}} | asked, GPU)


@pytest.mark.parametrize(
    "zero, words",
    [
        ({"offload_optimizer": {"device": "cpu"}}, "stage 0 keeps the optimizer's states on the device"),
        ({"stage": 2, "offload_optimizer": NVME}, "nvme needs stage 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "needs stage 3"),
        ({"stage": 3, "offload_param": NVME}, "the optimizer's states, which are larger, stay in memory"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme_path: is missing"),
        ({"stage": 3, "offload_optimizer": NVME | {"nvme_path": "here"}}, "nvme_path: must be absolute"),
        ({"stage": 3, "offload_optimizer": NVME | {"buffer_count": 3}}, "3 is too few"),
        (
            {"stage": 3, "offload_optimizer": NVME | {"buffer_count": 4, "pipeline_read": True}},
            "doubled by each of pipeline_read and pipeline_write; at least 8",
        ),
        (
            {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME, "stage3_max_reuse_distance": 10**9},
            "'Not enough buffers'",
        ),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "ZeRO++ needs stage 3"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, "3 does not divide the 2 ranks of a node"),
        (
            {"stage": 3, "zero_hpz_partition_size": 2, "offload_optimizer": NVME, "offload_param": NVME},
            "cannot put the second copy of the weights on NVMe",
        ),
    ],
)
def test_one_thing_wrong(zero, words):
    (text,) = broken({"zero_optimization": zero})
    assert words in text


def test_aio_without_nvme_would_have_no_effect():
    assert "nothing is offloaded to NVMe" in broken({"zero_optimization": {"stage": 3}, "aio": {"queue_depth": 8}})[0]
    assert not broken({"zero_optimization": {"stage": 3, "offload_optimizer": NVME}, "aio": {"queue_depth": 8}})


def test_direct_io_works_in_whole_pages():
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}
    assert "must be a multiple of 4096, but it is 1000" in broken(nvme | {"aio": {"block_size": 1000}})[0]
    assert not broken(nvme | {"aio": {"block_size": 8192}})


def test_zeropp_between_nodes():
    quantized = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    assert not broken({"zero_optimization": quantized}, GPUS)
    assert "leaves it out silently" in broken({"zero_optimization": quantized}, GPU)[0]
    assert len(broken({"zero_optimization": quantized}, CPU)) == 3  # no kernels for either, and one node


def test_no_rule_builds_on_a_value_that_is_wrong_by_itself():
    for zero in (
        {"stage": 4, "offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 2},
        {"stage": 3, "offload_optimizer": {"device": "disk"}, "offload_param": NVME},
        {"stage": 3, "offload_optimizer": NVME | {"nvme_path": 5, "buffer_count": "many"}},
    ):
        values, problems = read_values({"zero_optimization": zero})
        assert problems and not list(check_rules(values, CPU))
