"""Builds an engine in fp16 on the CPU: slow but right, so that fp16's arithmetic can be tested without a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dsllm.config.train import Precision
from dsllm.engine.deepspeed_library import deepspeed


@contextlib.contextmanager
def fp16_on_cpu(precision: Precision) -> Iterator[None]:
    """Let DeepSpeed's accelerator claim fp16 while an fp16 engine is built on a CPU.

    In other precisions, and after the block, it answers as usual: DeepSpeed looks at the answer there too (build.py,
    `_construction`). Runs refuse fp16 on CPUs; comparisons and tests need it.
    """
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    if precision != "fp16" or accelerator.device_name() != "cpu":
        yield
        return
    accelerator.is_fp16_supported = lambda: True  # attributes of the object, before the class's methods
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    try:
        yield
    finally:
        del accelerator.is_fp16_supported, accelerator.supported_dtypes
