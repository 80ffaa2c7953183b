"""ZeRO-0: every rank has whole parameters, in fp32 without any wrapper, or with fp32 masters next to 16-bit weights."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from dsllm.config.train import Precision
from dsllm.engine.processes.process_group import World
from dsllm.engine.wrappers.wrapper import Outcome, Piece, Wrapper


class NoWrapper(Wrapper):
    """fp32 at ZeRO-0: DeepSpeed calls the optimizer directly, without norm, clipping or a check of the gradient."""

    attributes: ClassVar[tuple[str, ...]] = ("param_groups", "state")

    @property
    def torch_optimizer(self) -> Any:
        """The optimizer itself."""
        return self.optimizer

    def fix(self, precision: Precision, offloads: bool) -> None:
        """Reduce no gradients on one rank."""
        _skip_reduction_of_one_rank(self.engine, self.world)

    def trainable_pieces(self) -> Iterator[Piece]:
        """The parameters are their own masters."""
        for number, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                yield _whole(self.names[id(p)], p, p, number)

    def refresh(self) -> None:
        """Do nothing: the layers use the masters themselves."""

    def update(self, clipping: float) -> Outcome:
        """Measure the norm, clip, and drop a gradient that is not finite: DeepSpeed does none of it here."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, clipping or math.inf, foreach=True))
        if not math.isfinite(norm):
            for p in parameters:  # optimizers skip parameters without a gradient: neither weights nor state move
                p.grad = None
        self.engine.step()
        return Outcome(norm, math.isfinite(norm))


class UnfusedWrapper(Wrapper):
    """16 bits at ZeRO-0: FP16_UnfusedOptimizer, which serves bf16 too."""

    attributes: ClassVar[tuple[str, ...]] = ("fp16_groups", "fp32_groups", "optimizer")

    def fix(self, precision: Precision, offloads: bool) -> None:
        """Reduce no gradients on one rank. fp16 is refused at this stage."""
        _skip_reduction_of_one_rank(self.engine, self.world)

    def trainable_pieces(self) -> Iterator[Piece]:
        """Each 16-bit parameter has an fp32 master of its own."""
        groups = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        for number, (weights, masters) in enumerate(groups):
            for weight, master in zip(weights, masters, strict=True):
                yield _whole(self.names[id(weight)], weight, master, number)

    def refresh(self) -> None:
        """Round the masters to 16 bits."""
        for weights, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)


def _whole(name: str, parameter: torch.Tensor, master: torch.Tensor, group: int) -> Piece:
    shape = tuple(parameter.shape)
    return Piece(name=name, shape=shape, start=0, count=master.numel(), owner=master, group=group, replicated=True)


def _skip_reduction_of_one_rank(engine: Any, world: World) -> None:
    """Skip the reduction on one rank, which would only copy all gradients into a buffer and back."""
    if world.data_size == 1:
        engine.enable_backward_allreduce = False
