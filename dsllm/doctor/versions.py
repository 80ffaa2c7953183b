"""Versions of the libraries, and the variables that steer them: what each rank has, and whether all ranks agree."""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsllm.doctor.findings import Finding, Place, check, differing, error_if, where
from dsllm.version import __version__

PACKAGE = Path(__file__).resolve().parents[1]
REQUIRED = ("torch", "deepspeed")
"""Packages without which no rank can train."""
PACKAGES = (*REQUIRED, "transformers", "tokenizers", "safetensors", "numpy", "triton", "liger-kernel")
MUST_AGREE = ("torch", "deepspeed", "dsllm", "code of dsllm", "CUDA of torch", "NCCL")
"""Ranks that differ in one of these hang or compute different numbers; any other difference is advice."""
NOT_INSTALLED = "not installed"

STEERING = re.compile(r"(NCCL|GLOO|TORCH|OMP|MKL|KMP|CUDA|DS|UCX|PYTORCH)_\w+|DEEPSPEED_\w+|LD_PRELOAD")
"""Variables that change how ranks compute and communicate."""
OF_ONE_RANK = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_ERROR_FILE", "OMP_PLACES", "KMP_AFFINITY")
"""Variables that are meant to differ between ranks."""
NO_VALUES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""Variables whose value may be a secret."""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """The versions and steering variables of one rank."""

    versions: Mapping[str, str]
    environment: Mapping[str, str]


def look_at_versions(environment: Mapping[str, str] = os.environ) -> Versions:
    """This rank's versions, without importing a large library, because its import may fail."""
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
    """Short hash over all source files of a package: it differs between two checkouts of the same version."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's kernel driver; empty where there is no driver."""
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


# fmt: off
# One row per check: name, where, level, problem, action.
def check_versions(versions: Mapping[Place, Versions]) -> Iterator[Finding]:
    """Find what is missing on any rank, and what differs between ranks."""
    for name in dict.fromkeys(name for own in versions.values() for name in own.versions):
        values = {place: own.versions.get(name, NOT_INSTALLED) for place, own in versions.items()}
        missing = [place for place, value in values.items() if value == NOT_INSTALLED and name in REQUIRED]
        yield from check("versions", where(missing), error_if(missing),
            f"{name} is not installed",
            "pip install dsllm into the environment that the ranks use")
        for value, places, usual in differing(values):
            yield from check("versions", where(places), error_if(name in MUST_AGREE) or "advice",
                f"{name} is {value}, on the other ranks {usual}",
                "give every host the same environment (one on a shared file system, or one image)")
    for name in sorted({name for own in versions.values() for name in own.environment} - set(OF_ONE_RANK)):
        for value, places, usual in differing(
            {p: own.environment.get(name, "(not set)") for p, own in versions.items()}
        ):
            yield from check("environment", where(places), "advice",
                f"{name}={value}, on the other ranks {usual}",
                "set it to the same value on all hosts (deepspeed passes on what ./.deepspeed_env names), or on none")
