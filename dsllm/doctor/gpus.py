"""Checks that torch sees the GPUs, that all ranks have the same kind, and that no other program uses them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dsllm.byte_units import GIB
from dsllm.doctor.findings import Finding, Place, below, check, differing, error_if, one_per_host, where
from dsllm.engine.processes.device import Gpu

FREE_SHARE = 0.9
"""Share of a GPU's memory; if less is free before the run has started, another program uses the GPU."""


def has_driver() -> bool:
    """Whether this host has NVIDIA's driver."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


# fmt: off
# One row per check: name, where, level, problem, action.
def check_gpus(gpus: Mapping[Place, Gpu | None], drivers: Mapping[Place, bool]) -> Iterator[Finding]:
    """Check the ranks' GPUs.

    Args:
        gpus: None for a rank on a CPU.
        drivers: whether the rank's host has a driver.
    """
    for place, gpu in one_per_host(gpus).items():
        yield from check("GPUs", place.host, error_if(gpu is None and drivers[place]),
            "NVIDIA's driver is installed, but torch sees no GPU: torch is a build without CUDA, the driver is too old for "
            "it, or CUDA_VISIBLE_DEVICES hides the GPUs",
            "compare `nvidia-smi` with torch.version.cuda, and install the torch that fits the driver")
    cpu = "a CPU"
    for kind, places, usual in differing({place: gpu.name if gpu else cpu for place, gpu in gpus.items()}):
        yield from check("GPUs", where(places), error_if(cpu in (kind, usual)) or "advice",
            f"computes on {kind}, the other ranks on {usual}",
            "use hosts of one kind: every step waits for the slowest rank, and the smallest memory counts")
    for place, own in ((place, gpu) for place, gpu in gpus.items() if gpu):
        yield from check("GPUs", where([place]), below(own.memory_free / own.memory_total, advice=FREE_SHARE),
            f"{(own.memory_total - own.memory_free) / GIB:.1f} of {own.memory_total / GIB:.1f} GiB are already in use",
            "find the program that uses it (nvidia-smi)")
