"""Optimizer states that DeepSpeed keeps in files on NVMe: read where they lie, and in memory while they are replaced.

DeepSpeed swaps whole sub-groups of at least 1 MiB (aio.block_size where that is larger); smaller ones stay in memory.
Between two steps everything that can be swapped is in its file, one file per tensor, as plain fp32 values.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dsllm.slices import WEIGHTS


def is_swapped(optimizer: Any, group: int) -> bool:
    """Whether a sub-group of ZeRO-3 lives on NVMe between steps."""
    return bool(optimizer._swappable_optimizer_subgroup(group))


def swapped_tensors(optimizer: Any, group: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A swapped sub-group's fp32 weights, as WEIGHTS, and its moments `keys` as far as they exist: 1-d views of the files.

    Nothing is read until a view is; a view shows the file's content until the next step.
    """
    owner = optimizer.fp32_partitioned_groups_flat[group]
    info = optimizer.optimizer_swapper.swap_params_info[owner.ds_id]
    state = optimizer.optimizer.state.get(owner, {})
    wanted = {WEIGHTS: owner} | {key: state[key] for key in keys if key in state}
    found = {}
    for key, tensor in wanted.items():
        (context,) = (c for c in info.tensors if c.compute_tensor is tensor)
        found[key] = torch.from_file(context.swap_path, shared=False, size=info.numel(), dtype=info.dtype())
    return found


def forget_moments(optimizer: Any) -> None:
    """Adam's moments start anew; what is on NVMe of them is written over later."""
    optimizer.optimizer_swapper.purge_state()


@contextlib.contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """A swapped sub-group is in memory inside the block, and what was written to it, new moments included, on NVMe after."""
    optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    optimizer._optimizer_states_and_gradient_swap_out(group)
