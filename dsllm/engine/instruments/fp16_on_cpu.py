"""Lets a process build an engine in fp16 on the CPU: slow, but right, and so a way to test fp16's arithmetic without a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dsllm.config.train import Precision
from dsllm.engine.deepspeed_library import deepspeed


@contextlib.contextmanager
def fp16_on_cpu(precision: Precision) -> Iterator[None]:
    """While an engine in fp16 is built, tell DeepSpeed that the accelerator has fp16; other precisions change nothing.

    Runs refuse fp16 on CPU; comparisons and tests need it. Only for the block: what DeepSpeed does in other precisions
    depends on the answer too (build.py, `_construction`).
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
