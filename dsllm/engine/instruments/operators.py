"""DeepSpeed's compiled operators: which are installed, which must be built first, and which build tools are missing."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME, get_cxx_compiler

from dsllm.engine.deepspeed_library import deepspeed

CXX, NINJA, LIBAIO, NVCC = "C++ compiler", "ninja", "libaio header", "nvcc"

PURPOSES = {
    "async_io": ("offload to NVMe", (CXX, NINJA, LIBAIO)),
    "pin_memory": ("offload to NVMe", (CXX, NINJA)),
    "cpu_adam": ("DeepSpeed's own Adam for offload; dsllm hands in torch's", (CXX, NINJA)),
    "fused_adam": ("DeepSpeed's own Adam on GPUs; dsllm hands in torch's", (CXX, NINJA, NVCC)),
    "quantizer": ("ZeRO++'s quantized weights and gradients, GPUs only", (CXX, NINJA, NVCC)),
}
"""Operator -> what uses it, and what it takes to build it."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator on this host."""

    purpose: str
    ready: bool
    """Built with DeepSpeed itself, at its installation."""
    missing_tools: tuple[str, ...]
    """What is missing to build it when it is first used."""


@dataclass(frozen=True, kw_only=True)
class Operators:
    """What this host has and could build."""

    tools: Mapping[str, str]
    """Tool -> its path; empty: it is not installed."""
    operators: Mapping[str, Operator]


def look_at_operators() -> Operators:
    """The operators and tools of this host; builds nothing."""
    tools = build_tools()
    wanted = {name: row for name, row in PURPOSES.items() if NVCC not in row[1] or torch.version.cuda is not None}
    installed = deepspeed.git_version_info.installed_ops
    return Operators(
        tools=tools,
        operators={
            name: Operator(
                purpose=purpose,
                ready=bool(installed.get(name, False)),
                missing_tools=tuple(tool for tool in needs if not tools[tool]),
            )
            for name, (purpose, needs) in wanted.items()
        },
    )


def build_tools() -> dict[str, str]:
    """Paths of the tools that DeepSpeed builds its operators with; empty: not installed."""
    compiler = shutil.which(get_cxx_compiler()) or ""
    nvcc = shutil.which("nvcc") or (str(Path(CUDA_HOME) / "bin" / "nvcc") if CUDA_HOME else "")
    return {
        CXX: compiler,
        NINJA: shutil.which("ninja") or "",
        LIBAIO: "libaio.h" if compiler and _has_header(compiler, "libaio.h") else "",
        NVCC: nvcc if nvcc and Path(nvcc).is_file() else "",
    }


def _has_header(compiler: str, name: str) -> bool:
    look = [compiler, "-E", "-x", "c++", "-include", name, os.devnull]
    return subprocess.run(look, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0
