"""ZeRO-1 and 2: the parameters of a group follow each other in one flat tensor, of which rank r has the r-th part."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist

from dsllm.config.train import Precision
from dsllm.engine.processes.device import parameter_dtype
from dsllm.engine.wrappers.loss_scale import grow_after_step, stay_at_minimum
from dsllm.engine.wrappers.owners_send import let_owners_send
from dsllm.engine.wrappers.reduce_at_once import measure_in_cache, reduce_at_once
from dsllm.engine.wrappers.shared_masters import add_up_in_place, share_weights
from dsllm.engine.wrappers.skipped_step import drop_skipped_gradients
from dsllm.engine.wrappers.wrapper import Piece, Wrapper


class FlatWrapper(Wrapper):
    """DeepSpeedZeroOptimizer: stages 1 and 2, but not bf16 at stage 1 with gradients summed in fp32."""

    attributes: ClassVar[tuple[str, ...]] = (
        "single_partition_of_fp32_groups", "real_dp_process_group", "round_robin_bit16_groups", "round_robin_bit16_offsets",
        "update_lp_params", "optimizer", "partition_size", "gradient_reduction_w_predivide", "get_grad_norm_direct",
    )  # fmt: skip

    def fix(self, precision: Precision, offloads: bool) -> None:
        """Faster collectives on CPUs, fp16's loss scale, shared fp32 masters: see the functions that it calls."""
        if self.world.device.type == "cpu":
            let_owners_send()
        if precision == "fp16":
            grow_after_step(self.optimizer)
            stay_at_minimum(self.optimizer)
        if offloads:
            drop_skipped_gradients(self.optimizer)
        elif parameter_dtype(precision) == torch.float32:
            share_weights(self.optimizer)
            add_up_in_place(self.optimizer, self.world)
            if self.world.device.type == "cpu":
                measure_in_cache(self.optimizer)
                if not self.optimizer.partition_gradients and not self.optimizer.overlap_comm:
                    reduce_at_once(self.optimizer)

    def trainable_pieces(self) -> Iterator[Piece]:
        """The parameters of each group, cut at the borders of this rank's part."""
        for g, flat in enumerate(self.optimizer.single_partition_of_fp32_groups):
            offsets = self.optimizer.round_robin_bit16_offsets[g]
            yield from self._cut(g, flat, self.optimizer.round_robin_bit16_groups[g], offsets)

    def refresh(self) -> None:
        """Gather the updated weights, as DeepSpeed does after a step."""
        self.optimizer.update_lp_params()

    def _cut(
        self, group: int, flat: torch.Tensor, parameters: Sequence[torch.Tensor], offsets: Sequence[int]
    ) -> Iterator[Piece]:
        """
        Args:
            flat: this rank's fp32 part of the group
            offsets: of each parameter in the whole group, in elements
        """
        first = dist.get_rank(self.optimizer.real_dp_process_group[group]) * flat.numel()
        for parameter, at in zip(parameters, offsets, strict=True):
            low, high = max(at, first), min(at + parameter.numel(), first + flat.numel())
            if low < high:
                yield Piece(
                    name=self.names[id(parameter)],
                    shape=tuple(parameter.shape),
                    start=low - at,
                    count=high - low,
                    owner=flat,
                    offset=low - first,
                    group=group,
                )


class Bf16Wrapper(FlatWrapper):
    """BF16_Optimizer: bf16 at stage 1 with gradients summed in fp32."""

    attributes: ClassVar[tuple[str, ...]] = (
        "fp32_groups_flat_partition",
        "real_dp_process_group",
        "bf16_groups",
        "update_lp_params",
        "optimizer",
    )

    def fix(self, precision: Precision, offloads: bool) -> None:
        """Let owners send on CPUs. With offload DeepSpeed uses DeepSpeedZeroOptimizer instead of this class."""
        assert not offloads, "DeepSpeed's BF16_Optimizer does not offload"
        if self.world.device.type == "cpu":
            let_owners_send()

    def trainable_pieces(self) -> Iterator[Piece]:
        """Parameters follow each other without gaps."""
        for g, flat in enumerate(self.optimizer.fp32_groups_flat_partition):
            parameters = self.optimizer.bf16_groups[g]
            offsets, at = [], 0
            for p in parameters:
                offsets.append(at)
                at += p.numel()
            yield from self._cut(g, flat, parameters, offsets)
