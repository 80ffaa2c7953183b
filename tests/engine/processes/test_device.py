"""The device of a process: types of numbers, peak speed, threads and memory."""

import os
import subprocess
import sys

import pytest
import torch

from dsllm.config.precision import compute_bits, parameter_bits
from dsllm.config.train import PRECISIONS
from dsllm.engine.processes.device import (
    GEMM_FLOPS,
    choose_device,
    compute_dtype,
    data_sheet_tflops,
    gemm_seconds,
    gpu_identity,
    gpu_number,
    gpu_of,
    library_versions,
    num_threads,
    parameter_dtype,
    peak_flops,
    peak_memory_gib,
)
from dsllm.errors import LaunchError
from tests.helpers.launched import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10-24Q", 125),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_that_of_its_own_data_sheet(name, tflops):
    assert data_sheet_tflops(name) == tflops


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T4", "AMD MI300X", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H20", "Tesla V100S-PCIE-32GB", "NVIDIA A10M", "",
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_in_the_table_has_no_peak(name):
    assert data_sheet_tflops(name) is None


def test_the_peak_of_a_cpu_is_measured_unless_it_is_given():
    assert peak_flops(CPU, "fp32", 3.5) == (3.5e12, "log.peak_tflops")
    flops, origin = peak_flops(CPU, "fp32", None)
    assert flops > 1e8 and origin == "matrix products of 1024 in float32, measured"
    # the best of some runs: none of a few more is twice as fast
    assert min(gemm_seconds(CPU, torch.float32, repeats=3)) > GEMM_FLOPS["cpu"] / flops / 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_types_are_as_wide_as_the_config_counts_them(precision):
    assert 8 * parameter_dtype(precision).itemsize == parameter_bits(precision)
    assert 8 * compute_dtype(precision).itemsize == compute_bits(precision)


def test_memory_and_threads_of_this_process():
    before = peak_memory_gib(CPU)
    held = torch.ones(2**26)  # a quarter of a GiB
    assert peak_memory_gib(CPU) - before >= 0 and peak_memory_gib(CPU) > held.nbytes / 2**30
    assert num_threads() == torch.get_num_threads()
    assert gpu_of(CPU) is None and "CUDA of torch" in library_versions()


SET_UP = (
    "from dsllm.engine.processes.device import *; cores = set_up_process(2); print(cores.num_threads, num_threads())"
)


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "1"])
def test_threads_are_the_ranks_cores_unless_the_user_says_otherwise(given):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    done = subprocess.run(
        [sys.executable, "-c", SET_UP], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    cores, threads = done.stdout.split()
    assert threads == (given or cores)


def test_a_rank_that_sees_one_gpu_has_that_one():
    """As under srun --gpus-per-task=1, whatever the rank's number on its host."""
    assert [gpu_number(rank, 1) for rank in (0, 1, 7)] == [0, 0, 0]
    assert [gpu_number(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(LaunchError, match="local rank 4, but torch sees 4 GPUs here"):
        gpu_number(4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_gpu_has_a_name_of_its_own():
    assert gpu_identity(choose_device(0)).startswith("GPU-") and gpu_identity(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_without_a_gpu_a_rank_is_on_the_cpu():
    assert choose_device(5) == CPU and gpu_identity(CPU) is None
