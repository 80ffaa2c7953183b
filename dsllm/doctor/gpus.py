"""Judges the GPUs: seen by torch at all, alike, and free."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dsllm.byte_units import GIB
from dsllm.doctor.findings import Finding, Place, differing, one_per_host, where
from dsllm.engine.processes.device import Gpu

IN_USE_SHARE = 0.1
"""Of a GPU's memory: more than that before anything has started is another program's."""


def driver_is_there() -> bool:
    """Whether this host has NVIDIA's driver."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def check_gpus(gpus: Mapping[Place, Gpu | None], drivers: Mapping[Place, bool]) -> Iterator[Finding]:
    """What is wrong with the ranks' GPUs.

    Args:
        gpus: None for a rank on a CPU.
        drivers: whether the rank's host has a driver.
    """
    for place in one_per_host(gpus):
        if gpus[place] is None and drivers[place]:
            yield Finding(
                level="error",
                check="GPUs",
                where=place.host,
                problem="NVIDIA's driver is there, but torch sees no GPU: a build without CUDA, too old a driver for it, "
                "or CUDA_VISIBLE_DEVICES hides them",
                action="compare `nvidia-smi` with torch.version.cuda, and install the torch that fits the driver",
            )
    kinds = {place: gpu.name if gpu else "a CPU" for place, gpu in gpus.items()}
    for kind, places, usual in differing(kinds):
        yield Finding(
            level="error" if "a CPU" in (kind, usual) else "advice",
            check="GPUs",
            where=where(places),
            problem=f"computes on {kind}, the other ranks on {usual}",
            action="use hosts of one kind: every step waits for the slowest rank, and the smallest memory counts",
        )
    for place, gpu in gpus.items():
        if gpu and gpu.memory_free < (1 - IN_USE_SHARE) * gpu.memory_total:
            used = gpu.memory_total - gpu.memory_free
            yield Finding(
                level="advice",
                check="GPUs",
                where=where([place]),
                problem=f"{used / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB are in use already",
                action="look who uses it (nvidia-smi)",
            )
