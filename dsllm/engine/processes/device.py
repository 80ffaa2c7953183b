"""The device of this process, and what is set once in it: threads, allocator, peak speed. The only file with torch.cuda."""

import ctypes
import gc
import importlib.util
import os
import re
import resource
import shutil
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dsllm.byte_units import GIB
from dsllm.config.train import Precision
from dsllm.engine.processes.cores import Cores, cores_of_rank
from dsllm.errors import ConfigError, LaunchError

GPU_PEAK_TFLOPS = {  # dense bf16, by the name of NVIDIA's driver; where a data sheet counts sparsity, half of its number
    "V100-SXM2": 125.0,  # fp16; NVIDIA's "Tesla V100" data sheet, also for PCIe
    "V100-PCIE": 112.0,
    "A100": 312.0,  # SXM4 and PCIe; https://www.nvidia.com/en-us/data-center/a100/
    "A10": 125.0,  # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    "A10G": 70.0,  # https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf
    "L4": 121.0,  # https://resources.nvidia.com/en-us-l4/l4-datasheet
    "L40": 181.0,  # 181.05; https://www.nvidia.com/en-us/data-center/l40/
    "L40S": 362.0,  # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    "H100": 989.0,  # SXM, 1,979 with sparsity; https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    "H100 NVL": 835.0,  # https://www.nvidia.com/en-us/data-center/h100/
    "H100 PCIe": 756.0,  # 1,513 with sparsity, in the H100's data sheet
    "H200": 989.0,  # SXM; https://www.nvidia.com/en-us/data-center/h200/
    "B200": 2250.0,  # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703
    "RTX 3090": 71.0,  # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    "RTX 4090": 165.2,  # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
}
_OTHER_CHIPS = r"Laptop|Ti|SUPER|D|MIG"
"""Words behind a model's number that make it another chip, or a part of one."""
GEMM_SIZES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square matrices that a device's speed is measured with."""
GEMM_FLOPS = {device: 2 * size**3 for device, size in GEMM_SIZES.items()}


def choose_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    A rank that sees one GPU has it from its launcher (srun --gpus-per-task=1, --gpu-bind): whether another rank has it too
    is found when the ranks meet.

    Raises:
        LaunchError: more ranks on this host than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = gpu_number(local_rank, torch.cuda.device_count())
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def gpu_number(local_rank: int, num_visible: int) -> int:
    """Which of the GPUs that a rank sees is its own.

    Raises:
        LaunchError: more ranks on this host than GPUs.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise LaunchError(
            f"local rank {local_rank}, but torch sees {num_visible} GPUs here "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): at most one rank per GPU"
        )
    return local_rank


def gpu_identity(device: torch.device) -> str | None:
    """The name of a GPU that no other one has, on any host; None on a CPU."""
    return None if device.type == "cpu" else f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def check_compiler(device: torch.device) -> None:
    """Check that this machine has what torch.compile needs on this device.

    Raises:
        ConfigError: something is missing; without this check the first step would fail, with a less helpful message.
    """
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    compiler = os.environ.get(variable, usual)
    missing = [] if shutil.which(compiler) else [f"a compiler ({compiler}; another one by {variable})"]
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        missing.append("Triton (the package 'triton')")
    if missing:
        raise ConfigError(
            f"train.compile: torch.compile needs {' and '.join(missing)}: install it, or set train.compile to false"
        )


def parameter_dtype(precision: Precision) -> torch.dtype:
    """The type in which the layers see their weights."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def compute_dtype(precision: Precision) -> torch.dtype:
    """The type of the activations between layers."""
    return torch.bfloat16 if precision == "fp32_compute_bf16" else parameter_dtype(precision)


def set_up_process(local_size: int, local_rank: int = 0, bind_cores: bool | None = False) -> Cores:
    """Settings of the whole process, made here so that they do not depend on the launcher's environment.

    One thread per core of this rank, fewer under a CPU quota, unless OMP_NUM_THREADS says otherwise. Returns the rank's
    cores.
    """
    cores = cores_of_rank(local_rank, local_size, bind_cores)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores.num_threads)
    _keep_freed_memory()
    # What the imports made is never garbage. DeepSpeed collects garbage six times while it builds a bf16 engine, and Python
    # now and then in a step: 0.2 s each if it has to walk through all of that.
    gc.freeze()
    return cores


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: mapping and unmapping each large tensor costs more than filling it (page faults)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 256 * 2**20)


def peak_flops(device: torch.device, precision: Precision, given_tflops: float | None) -> tuple[float, str]:
    """FLOP/s of one device that MFU is measured against, and where the number comes from."""
    if given_tflops is not None:
        return given_tflops * 1e12, "log.peak_tflops"
    if device.type == "cpu":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        flops = GEMM_FLOPS["cpu"] / min(gemm_seconds(device, dtype, repeats=5))
        return flops, f"matrix products of {GEMM_SIZES['cpu']} in {str(dtype).removeprefix('torch.')}, measured"
    name = torch.cuda.get_device_name(device)
    peak = data_sheet_tflops(name)
    if peak is None:
        return 0.0, f"unknown for {name}: set log.peak_tflops"
    return peak * 1e12, f"data sheet of {name}"


def data_sheet_tflops(name: str) -> float | None:
    """Peak of a GPU by the name that its driver gives; None where it is not in the table."""
    if re.search(rf"\b({_OTHER_CHIPS})\b", name):
        return None
    # whole words: an L40 is no L4. Of "H100" and "H100 PCIe" the longer one is the GPU's
    known = max((key for key in GPU_PEAK_TFLOPS if re.search(rf"\b{key}\b", name)), key=len, default="")
    if "NVL" in name and "NVL" not in known:  # a slower chip than the one without
        return None
    return GPU_PEAK_TFLOPS.get(known)


def gemm_seconds(device: torch.device, dtype: torch.dtype, repeats: int) -> list[float]:
    """Seconds of each of some square matrix products, GEMM_FLOPS each, with this process's threads or on its GPU."""
    size = GEMM_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # a GPU is faster on equal numbers
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]  # the first one also loads the library


def num_threads() -> int:
    """Threads that one operation of this process may use on the CPU."""
    return torch.get_num_threads()


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A rank's GPU. Memory in bytes."""

    name: str
    memory_total: int
    memory_free: int


def gpu_of(device: torch.device) -> Gpu | None:
    """Name and memory of this rank's GPU; None on a CPU."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(name=torch.cuda.get_device_name(device), memory_total=total, memory_free=free)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that torch carries: those it was built with, on a GPU machine or not."""
    found = {"CUDA of torch": torch.version.cuda or "none"}
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
