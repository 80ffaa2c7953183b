"""ZeRO-1 in fp32 on CPUs: a group's gradients are reduced as one tensor, and measured without a copy of it in fp64."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

NORM_ELEMENTS = 2**17
"""Gradients whose norm is taken at once: 1 MiB in fp64, which stays in a core's cache."""


def reduce_at_once(optimizer: Any) -> None:
    """Copy each gradient once, to its place in a flat tensor of its group, and reduce that tensor.

    DeepSpeed copies every gradient to a bucket, clears a flat partition and adds to it what was reduced, and calls a dozen
    functions per parameter: 2 to 3 % of a step of 20 million parameters (deepspeed 0.19.8). Every element is summed over
    the same ranks: on one and two ranks the bits are the same; on more, gloo's ring may begin elsewhere.

    Gradients must add up over micro-batches on their parameters, as they do at stage 1 without `overlap_comm`.
    """

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        for group in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[group] = _reduced_part(optimizer, group)
        optimizer.overlapping_partition_gradients_reduce_epilogue()

    optimizer.reduce_gradients = reduce_gradients
    optimizer.reduce_bucket_size = 1  # elements: the buckets are made all the same


@torch.no_grad()
def _reduced_part(optimizer: Any, group: int) -> GradPartitionBufferGroup:
    """This rank's part of a group's averaged gradient. The parameters let go of theirs."""
    parameters, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
    whole = torch.empty_like(optimizer.bit16_groups_flat[group])
    end = 0
    for parameter, offset in zip(parameters, offsets, strict=True):
        place = whole[offset : offset + parameter.numel()]
        gradient = optimizer.get_gradient_for_reduction(parameter)
        if gradient is None:  # the loss does not depend on it
            place.zero_()
        else:
            place.copy_(gradient.view(-1))
            optimizer.clear_grad_attribute(parameter)
        end = offset + parameter.numel()
    whole[end:].zero_()  # what makes all parts equally long
    reduced = optimizer.gradient_reduction_w_predivide(whole, optimizer.communication_data_type)
    process_group, size = optimizer.real_dp_process_group[group], int(optimizer.partition_size[group])
    first = dist.get_rank(process_group) * size
    part = reduced[first : first + size].to(whole.dtype)
    if size < len(whole):
        part = part.clone()  # lets go of the rest
    places = [
        part[max(offset - first, 0) : offset + parameter.numel() - first]
        for parameter, offset in zip(parameters, offsets, strict=True)
        if offset < first + size and offset + parameter.numel() > first
    ]
    return GradPartitionBufferGroup(places, part)


def measure_in_cache(optimizer: Any) -> None:
    """Take the gradient's norm piece by piece.

    DeepSpeed converts each gradient to fp64 as a whole, for this alone: twice its size is written to memory and read
    again, 17 ms for 20 million elements with two threads, 34 with one, where pieces take 8 and 12 (deepspeed 0.19.8). Sums
    stay in fp64, in another order, before they are rounded to fp32.
    """
    measure = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(
        gradients: Sequence[torch.Tensor], params: Sequence[torch.nn.Parameter], norm_type: float = 2
    ) -> torch.Tensor:
        assert norm_type == 2, f"norm {norm_type}"
        # padding has no parameter
        kept = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        return measure([_norm(gradient) for gradient in kept], params)  # the norm of a norm is itself

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """fp64 [1]"""
    pieces = gradient.detach().reshape(-1).split(NORM_ELEMENTS)
    wide = torch.empty(len(pieces[0]), dtype=torch.double)
    squares = [torch.dot(copy, copy) for piece in pieces for copy in (wide[: len(piece)].copy_(piece),)]
    return torch.stack(squares).sum().sqrt().view(1)
