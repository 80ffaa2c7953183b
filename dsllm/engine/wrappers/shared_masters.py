"""fp32 under ZeRO: weights and masters are one tensor, and gradients add up where the optimizer reads them."""

from typing import Any

import torch
import torch.distributed as dist

from dsllm.engine.processes.process_group import World


def share_weights(optimizer: Any, stage: int) -> None:
    """Make the fp32 masters and the layers' fp32 weights, which are the same numbers, one tensor instead of two.

    At stage 3 DeepSpeed means to do this itself, but compares a torch.device with a string, which is never equal
    (stage3.py, line 1163). At stages 1 and 2 it copies. Not where anything is offloaded: the two lie on different
    devices there. To be called before weights are loaded: what the masters held is dropped.
    """
    if stage == 3:
        for master, weight in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            master.data = weight
        return
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        master.data = optimizer.parallel_partitioned_bit16_groups[group][rank].data
    optimizer._link_all_hp_params()  # what reads masters by their parameter holds views, of the copy until now


def add_up_in_place(optimizer: Any, world: World) -> None:
    """ZeRO 1 and 2: add reduced gradients straight to the flat partition that AdamW reads.

    DeepSpeed does so where gradients of 16-bit parameters add up in fp32. Gradients of fp32 parameters it copies from the
    bucket to a buffer, and from there to the flat partition: twice the memory (deepspeed 0.19.8).
    """
    optimizer._use_compact_grad_partition_buffer = lambda group: True
    if world.device.type != "cpu":
        return  # what follows frees gradients at once, which another stream might still read
    optimizer.copy_grads_in_partition = _let_go
    if world.size == 1:
        optimizer.reduce_bucket_size = 1  # elements: a larger gradient is taken as it is, not copied to a bucket


def _let_go(parameter: torch.nn.Parameter, group: int | None = None) -> None:
    """In the place of the copy: the gradient has been added already."""
    parameter.grad = None
