"""What DeepSpeed's operators need is looked for where it would be used from, and nothing is built."""

import shutil
from pathlib import Path

from dsllm.engine.instruments.operators import CXX, LIBAIO, NINJA, NVCC, build_tools, look_at_operators


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not any(build_tools()[tool] for tool in (CXX, NINJA, LIBAIO))
    operators = look_at_operators().operators
    assert operators["async_io"].missing_tools == (CXX, NINJA, LIBAIO) and not operators["async_io"].ready
    for name in ("c++", "g++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")  # a compiler that finds no header
        (tmp_path / name).chmod(0o755)
    assert look_at_operators().operators["async_io"].missing_tools == (LIBAIO,)
    assert look_at_operators().operators["cpu_adam"].missing_tools == ()


def test_operators_of_gpus_are_reported_on_gpus_only():
    import torch

    assert ("fused_adam" in look_at_operators().operators) == (torch.version.cuda is not None)


def test_what_is_there_is_found():
    tools = build_tools()
    assert bool(tools[CXX]) == bool(shutil.which("c++") or shutil.which("g++"))
    assert not tools[NVCC] or Path(tools[NVCC]).is_file()
