"""ZeRO-3: rank r has the r-th part of each parameter; the parts of a sub-group follow each other in one flat tensor."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from dsllm.config.train import Precision
from dsllm.engine.processes.device import parameter_dtype
from dsllm.engine.wrappers.loss_scale import grow_after_step, stay_at_minimum
from dsllm.engine.wrappers.shared_masters import share_weights_of_stage_3
from dsllm.engine.wrappers.swapped_groups import forget_swapped_state, group_in_memory, is_swapped, swapped_tensors
from dsllm.engine.wrappers.wrapper import Piece, Wrapper


class Stage3Wrapper(Wrapper):
    """DeepSpeedZeroOptimizer_Stage3."""

    attributes: ClassVar[tuple[str, ...]] = (
        "fp16_groups", "fp32_partitioned_groups_flat", "persistent_parameters", "sub_group_to_group_id",
        "_get_param_partition_rank", "_reassign_or_swap_out_partitioned_parameters", "invalidate_secondary_tensor",
        "_swappable_optimizer_subgroup", "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out", "optimizer",
    )  # fmt: skip

    def fix(self, precision: Precision, offloads: bool) -> None:
        """Fix the loss scale of fp16, and share fp32 masters with the weights: see the functions that it calls."""
        if precision == "fp16":
            grow_after_step(self.optimizer)
            stay_at_minimum(self.optimizer)
        if not offloads and parameter_dtype(precision) == torch.float32:
            share_weights_of_stage_3(self.optimizer)

    def trainable_pieces(self) -> Iterator[Piece]:
        """This rank's part of each parameter, sub-group by sub-group."""
        for sub_group, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            swapped = sub_group if is_swapped(self.optimizer, sub_group) else None
            group = self.optimizer.sub_group_to_group_id[sub_group]
            offset = 0
            for p in self.optimizer.fp16_groups[sub_group]:
                part = self._part(p, self.optimizer._get_param_partition_rank(p))
                if part.count:
                    yield dataclasses.replace(part, owner=flat, offset=offset, group=group, swapped=swapped)
                offset += p.ds_tensor.ds_numel

    def frozen_pieces(self) -> Iterator[Piece]:
        """This rank's part of each frozen parameter, in the type that the layers see."""
        for p in self.engine.module.parameters():
            if not p.requires_grad:
                part = self._part(p, dist.get_rank(p.ds_process_group))
                if part.count:
                    yield part

    def _part(self, p: Any, rank: int) -> Piece:
        """The part of a parameter that a rank has, as a piece of the partition itself; the last ranks' parts are padded."""
        width = p.ds_tensor.ds_numel
        start = rank * width
        return Piece(
            name=self.names[id(p)],
            shape=tuple(p.ds_shape),
            start=start,
            count=max(0, min(width, p.ds_numel - start)),
            owner=p.ds_tensor,
            group=None,
        )

    def refresh(self) -> None:
        """Round the masters to the partitions of the weights, and gather the small weights that every rank keeps whole."""
        optimizer = self.optimizer
        for sub_group in range(len(optimizer.fp16_groups)):
            if not is_swapped(optimizer, sub_group):  # those were refreshed while their masters were in memory
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        small = optimizer.persistent_parameters
        if small:  # release the old values first: gathering skips parameters that are whole already
            small[0].partition(small)
        optimizer.invalidate_secondary_tensor()  # ZeRO++'s second copy, made of old values by the release
        if small:
            small[0].all_gather(small)

    def tensors(self, piece: Piece) -> dict[str, torch.Tensor]:
        """From memory, or as views of the files on NVMe."""
        if piece.swapped is None:
            return super().tensors(piece)
        return swapped_tensors(self.optimizer, piece.swapped, self.state_names(piece))

    @contextlib.contextmanager
    def in_memory(self, piece: Piece) -> Iterator[None]:
        """Bring a sub-group from NVMe into memory for the block; afterwards the layers' weights have its values too."""
        if piece.swapped is None:
            yield
            return
        with group_in_memory(self.optimizer, piece.swapped):
            yield
            self.optimizer._reassign_or_swap_out_partitioned_parameters(piece.swapped)

    def forget_state(self) -> None:
        """Let the optimizer start anew, also on NVMe."""
        super().forget_state()
        if any(piece.swapped is not None for piece in self.trainable_pieces()):
            forget_swapped_state(self.optimizer)
