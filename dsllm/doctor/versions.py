"""Versions of all that computes, and the variables that steer it: what each rank has, and whether all have the same."""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsllm.doctor.findings import Finding, Level, Place, differing, where
from dsllm.version import __version__

PACKAGE = Path(__file__).resolve().parents[1]
REQUIRED = ("torch", "deepspeed")
"""Packages without which no rank can train."""
PACKAGES = (*REQUIRED, "transformers", "tokenizers", "safetensors", "numpy", "triton", "liger-kernel")
MUST_AGREE = ("torch", "deepspeed", "dsllm", "code of dsllm", "CUDA of torch", "NCCL")
"""Ranks that differ in these hang or compute different things; the others are told as advice."""
NOT_INSTALLED = "not installed"

STEERING = re.compile(r"(NCCL|GLOO|TORCH|OMP|MKL|KMP|CUDA|DS|UCX|PYTORCH)_\w+|DEEPSPEED_\w+|LD_PRELOAD")
"""Variables that change how ranks compute and talk."""
OF_ONE_RANK = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_ERROR_FILE", "OMP_PLACES", "KMP_AFFINITY")
"""Those that rightly differ between ranks."""
NO_VALUES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What one rank has."""

    versions: Mapping[str, str]
    environment: Mapping[str, str]


def look_at_versions(environment: Mapping[str, str] = os.environ) -> Versions:
    """What can be known without importing anything large, so that it is known where an import fails."""
    versions = {
        "python": platform.python_version(),
        "dsllm": __version__,
        "code of dsllm": code_hash(PACKAGE),
        **{name: _installed(name) for name in PACKAGES},
        "NVIDIA driver": driver_version(),
        "kernel": platform.release(),
        "C library": _c_library(),
    }
    steering = {
        name: "(not shown)" if NO_VALUES.search(name) else value
        for name, value in sorted(environment.items())
        if STEERING.fullmatch(name)
    }
    return Versions(versions={name: text for name, text in versions.items() if text}, environment=steering)


def code_hash(package: Path) -> str:
    """Short hash over all source files of a package: hosts with other checkouts of one version differ in it."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The NVIDIA kernel driver's version, as it tells it; nothing where there is none."""
    try:
        found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+[\d.]+)", file.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found.group(1) if found else "unknown"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED if name in REQUIRED else ""


def _c_library() -> str:
    try:
        glibc = ctypes.CDLL("libc.so.6").gnu_get_libc_version
    except (OSError, AttributeError):
        return "not glibc"
    glibc.restype = ctypes.c_char_p
    return f"glibc {glibc().decode()}"


def check_versions(seen: Mapping[Place, Versions]) -> Iterator[Finding]:
    """What is missing anywhere, and what differs between ranks."""
    names = list(dict.fromkeys(name for own in seen.values() for name in own.versions))
    for name in names:
        values = {place: own.versions.get(name, NOT_INSTALLED) for place, own in seen.items()}
        missing = [place for place, value in values.items() if value == NOT_INSTALLED]
        if missing and name in REQUIRED:
            yield Finding(
                level="error",
                check="versions",
                where=where(missing),
                problem=f"{name} is not installed",
                action="pip install dsllm into the environment that the ranks use",
            )
        level: Level = "error" if name in MUST_AGREE else "advice"
        for value, places, usual in differing(values):
            yield Finding(
                level=level,
                check="versions",
                where=where(places),
                problem=f"{name} is {value}, on the other ranks {usual}",
                action="give every host the same environment (one on a shared file system, or one image)",
            )
    yield from _judge_environment(seen)


def _judge_environment(seen: Mapping[Place, Versions]) -> Iterator[Finding]:
    names = sorted({name for own in seen.values() for name in own.environment} - set(OF_ONE_RANK))
    for name in names:
        values = {place: own.environment.get(name, "(not set)") for place, own in seen.items()}
        for value, places, usual in differing(values):
            yield Finding(
                level="advice",
                check="environment",
                where=where(places),
                problem=f"{name}={value}, on the other ranks {usual}",
                action="set it alike on all hosts (deepspeed hands on what ./.deepspeed_env names), or nowhere",
            )
