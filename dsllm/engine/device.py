"""The device of this process, and what is set once in it: threads, allocator, peak speed. The only file with torch.cuda."""

import ctypes
import importlib.util
import os
import resource
import shutil
import time

import torch

from dsllm.config.train import Precision
from dsllm.errors import ConfigError

GPU_PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets
    "V100": 125.0,  # fp16
    "A100": 312.0,
    "A10": 125.0,
    "L4": 121.0,
    "L40S": 362.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
}
GIB = 2**30


def choose_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def check_compiler(device: torch.device) -> None:
    """What torch.compile needs on this device is there.

    Raises:
        ConfigError: it is not; without this the first step would say so, in other words.
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


def resolve_precision(asked: str, device: torch.device) -> Precision:
    """What `auto` means on this device: the fastest whose numbers are right."""
    if asked == "auto":
        return "fp32_compute_bf16" if device.type == "cpu" else "bf16"
    return asked  # type: ignore[return-value]  # the config's Literal holds exactly these and "auto"


def parameter_dtype(precision: Precision) -> torch.dtype:
    """The type in which the layers see their weights."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def compute_dtype(precision: Precision) -> torch.dtype:
    """The type of the activations between layers."""
    return torch.bfloat16 if precision == "fp32_compute_bf16" else parameter_dtype(precision)


def set_up_process(local_size: int) -> None:
    """Settings of the whole process, made here so that they do not depend on the launcher's environment."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _num_cores() // local_size))
    _keep_freed_memory()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


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
        return _measure_gemm(dtype), f"matrix products of 1024 in {str(dtype).removeprefix('torch.')}, measured"
    name = torch.cuda.get_device_name(device)
    known = [key for key in GPU_PEAK_TFLOPS if key in name]
    if not known:
        return 0.0, f"unknown for {name}: set log.peak_tflops"
    return GPU_PEAK_TFLOPS[max(known, key=len)] * 1e12, f"data sheet of {name}"


def _measure_gemm(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Best FLOP/s of a square matrix product with this process's threads."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
