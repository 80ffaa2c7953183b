"""Imports DeepSpeed with its surprises switched off: devices are not probed over and over, no compiler, no log lines."""

import functools
import logging
import os
import warnings

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime import compiler
from deepspeed.utils import numa

from dsllm.errors import require

# When ZeRO takes an optimizer it asks whether that is DeepSpeed's own Muon, which dsllm does not use, and so imports it. Its
# three functions are decorated with torch.compile, and that alone imports torch's whole compiler: a second and more.
_compile, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
require("deepspeed.runtime.zero.muon.muon_optimizer")
compiler.compile = _compile

# Without a GPU, ZeRO-3 asks with every bucket of gradients how many devices there are, and each answer runs `numactl` anew.
numa.get_numa_cores = functools.cache(numa.get_numa_cores)

# An empty table of operators: otherwise init_distributed probes every builder with the compiler and, on CPU, builds a
# shared-memory operator for a minute that training never uses and that stays in /dev/shm.
deepspeed.ops.__compatible_ops__ = {}
deepspeed.utils.logger.setLevel(logging.WARNING)
# deepspeed 0.19 calls collectives by names that torch 2.13 has renamed
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

TESTED_VERSIONS = "0.19.8"
"""Versions that engine/wrappers/ was tested with: it reads private attributes of DeepSpeed."""

__all__ = ["deepspeed"]
