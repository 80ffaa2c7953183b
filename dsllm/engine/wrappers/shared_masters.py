"""fp32 under ZeRO: the fp32 masters and the layers' weights are one tensor, and gradients add up where AdamW reads them."""

from typing import Any

import torch
import torch.distributed as dist

from dsllm.engine.processes.process_group import World


def share_weights(optimizer: Any) -> None:
    """ZeRO-1 and 2: make the fp32 masters views of the layers' fp32 weights, which are the same numbers.

    DeepSpeed copies. Not with offload, where masters and weights are on different devices. To be called before weights
    are loaded: the content of the masters is dropped.
    """
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        master.data = optimizer.parallel_partitioned_bit16_groups[group][rank].data
    optimizer._link_all_hp_params()  # DeepSpeed's views of the masters, by parameter, still show the copy


def share_weights_of_stage_3(optimizer: Any) -> None:
    """The same at ZeRO-3, where DeepSpeed intends it but compares a torch.device with a string, which is never equal
    (stage3.py, line 1163)."""
    for master, weight in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
    ):
        master.data = weight


def add_up_in_place(optimizer: Any, world: World) -> None:
    """ZeRO-1 and 2: add reduced gradients directly to the flat partition that the optimizer reads.

    DeepSpeed does so where gradients of 16-bit parameters add up in fp32. It copies gradients of fp32 parameters from the
    bucket to a buffer, and from there to the flat partition: twice the memory (deepspeed 0.19.8).
    """
    optimizer._use_compact_grad_partition_buffer = lambda group: True
    if world.device.type != "cpu":
        return  # the rest frees gradients at once, and on a GPU another stream might still read them
    optimizer.copy_grads_in_partition = _let_go
    if world.data_size == 1:
        optimizer.reduce_bucket_size = 1  # elements: a larger gradient is used in place, not copied to a bucket


def _let_go(parameter: torch.nn.Parameter, group: int | None = None) -> None:
    """Replaces the copy: the gradient has been added already."""
    parameter.grad = None
