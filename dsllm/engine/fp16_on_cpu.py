"""Lets a process compute in fp16 on the CPU: slow, but right, and so a way to test fp16's arithmetic without a GPU."""

from typing import Any

import torch

from dsllm.engine.deepspeed_library import deepspeed


def allow_fp16_on_cpu() -> None:
    """Tell DeepSpeed that this process's accelerator has fp16. Runs refuse fp16 on CPU; comparisons and tests need it."""
    accelerator: Any = type(deepspeed.accelerator.get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
