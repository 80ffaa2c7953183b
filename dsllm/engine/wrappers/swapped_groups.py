"""Reads and replaces the sub-groups of ZeRO-3 that DeepSpeed keeps in files on NVMe.

DeepSpeed swaps whole sub-groups of at least 1 MiB (aio.block_size where that is larger); smaller ones stay in memory.
Between two steps everything that can be swapped is in its file, one file per tensor, as plain fp32 values.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dsllm.slices import WEIGHTS


def is_swapped(optimizer: Any, group: int) -> bool:
    """Whether a sub-group is on NVMe between steps."""
    return bool(optimizer._swappable_optimizer_subgroup(group))


def swapped_tensors(optimizer: Any, group: int, state_names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A swapped sub-group's fp32 weights, as WEIGHTS, and those of the optimizer's tensors that exist.

    The tensors are 1-d views of the files. Nothing is read until a view is; a view shows the file's content until the next
    step.
    """
    owner = optimizer.fp32_partitioned_groups_flat[group]
    info = optimizer.optimizer_swapper.swap_params_info[owner.ds_id]
    state = optimizer.optimizer.state.get(owner, {})
    tensors = {WEIGHTS: owner} | {name: state[name] for name in state_names if name in state}
    found = {}
    for name, tensor in tensors.items():
        (context,) = (c for c in info.tensors if c.compute_tensor is tensor)
        found[name] = torch.from_file(context.swap_path, shared=False, size=info.numel(), dtype=info.dtype())
    return found


def forget_swapped_state(optimizer: Any) -> None:
    """Let the optimizer start anew; its files on NVMe are overwritten later."""
    optimizer.optimizer_swapper.purge_state()


@contextlib.contextmanager
def group_in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """Bring a swapped sub-group into memory for the block; afterwards it is on NVMe again, new state included."""
    optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    optimizer._optimizer_states_and_gradient_swap_out(group)
