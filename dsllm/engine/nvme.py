"""NVMe offload: checks of this host before anything is built, and removal of the swap files at the end."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

from dsllm.byte_units import GIB
from dsllm.config.train import Precision
from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.instruments.operators import CXX, LIBAIO, NINJA, build_tools
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.settings.offload import OFFLOAD_BLOCKS, offloaded_bytes
from dsllm.errors import ConfigError

OPERATORS = ("pin_memory", "async_io")
"""DeepSpeed's compiled operators that read and write the NVMe."""
BUILD = "python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'"
LOCK_SECONDS = 10.0
"""Another process that only loads an operator holds its lock for about a second."""


def swap_folders(final: Mapping[str, Any]) -> list[Path]:
    """The run's own folders for swap files; empty where the run does not offload to NVMe."""
    blocks = (final["zero_optimization"].get(key, {}) for key in OFFLOAD_BLOCKS)
    return sorted({Path(block["nvme_path"]) for block in blocks if block.get("device") == "nvme"})


@contextlib.contextmanager
def swap_files(final: Mapping[str, Any], ranks: Ranks) -> Iterator[None]:
    """Remove this host's swap files when the block ends. Only while the run's directory is held.

    Args:
        final: the final DeepSpeed config
    """
    try:
        yield
    finally:
        if ranks.local_rank == 0:
            for folder in swap_folders(final):
                shutil.rmtree(folder, ignore_errors=True)


def check_nvme(final: Mapping[str, Any], num_parameters: int, precision: Precision, ranks: Ranks) -> None:
    """Refuse a host on which offload to NVMe would not work; does nothing where the run does not offload there.

    Args:
        final: the final DeepSpeed config
        precision: the run's, with auto resolved

    Raises:
        ConfigError: all problems of this host at once.
    """
    folders = swap_folders(final)
    if not folders:
        return
    per_rank = offloaded_bytes(final["zero_optimization"], num_parameters, precision, ranks.world_size).nvme
    problems = [p for folder in folders for p in _check_folder(folder, per_rank * ranks.local_size)]
    problems += _check_operators()
    if problems:
        raise ConfigError(problems)


def _check_folder(folder: Path, needed: int) -> Iterator[str]:
    """Check the folder that the JSON names; `folder` in it is the run's own."""
    path, where = folder.parent, "deepspeed JSON: zero_optimization: nvme_path"
    if not path.is_dir():
        yield f"{where} {path}: no such folder on {os.uname().nodename}: name one on a local NVMe in a copy of the JSON"
        return
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix="dsllm-probe-") as probe:
            os.close(os.open(probe.name, os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        yield (
            f"{where} {path}: cannot be used ({error.strerror}): it must be writable and on a disk that takes direct I/O, "
            "which file systems in memory do not"
        )
        return
    left_over = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())  # of an attempt that was killed
    free = shutil.disk_usage(path).free + left_over
    if free < needed:
        yield (
            f"{where} {path}: {free / GIB:.2f} GiB are free, but the ranks of this node write {needed / GIB:.2f} GiB: "
            "weights, moments and gradients in fp32, and the parameters"
        )


def _check_operators() -> Iterator[str]:
    """Check that async_io is built or can be, and that no stale lock blocks the build."""
    if all(deepspeed.git_version_info.installed_ops.get(name, False) for name in OPERATORS):
        return
    missing = list(_missing_tools())
    if missing:
        yield f"offload to NVMe: DeepSpeed's async_io cannot be loaded: install {' and '.join(missing)}"
    for name in OPERATORS:
        lock = _build_folder() / name / "lock"
        if _stays(lock):
            yield (
                f"offload to NVMe: {lock} is there: {name} is being built, or a build was killed, and every start would "
                "wait for it silently. If no build runs (`pgrep ninja`), delete the file"
            )
    unbuilt = [name for name in OPERATORS if not (_build_folder() / name / f"{name}.so").is_file()]
    if unbuilt and not missing:
        yield (
            f"offload to NVMe: DeepSpeed's {' and '.join(unbuilt)} must be compiled first, once (it takes 2 to 12 minutes, "
            f"which the ranks would spend waiting): {BUILD}"
        )


def _missing_tools() -> Iterator[str]:
    """The tools that are missing. DeepSpeed compiles with them, and links a test program at each start."""
    tools = build_tools()
    if not tools[CXX]:
        yield f"a C++ compiler ({get_cxx_compiler()}; apt install g++)"
    elif not tools[LIBAIO]:
        yield "libaio's header (apt install libaio-dev, dnf install libaio-devel)"
    if not tools[NINJA]:
        yield "ninja (pip install ninja, in an environment that is on the PATH)"


def _stays(lock: Path) -> bool:
    """Whether the lock stays for longer than a process needs that only loads the operator."""
    deadline = time.monotonic() + LOCK_SECONDS
    while lock.exists():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.2)
    return False


def _build_folder() -> Path:
    """The folder in which torch builds operators."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is not None:
        return Path(root)
    cuda = torch.version.cuda
    kind = "cpu" if cuda is None else "cu" + cuda.replace(".", "")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(get_default_build_root()) / f"{python}{sys.abiflags}_{kind}"
