"""Finds where numbers first go wrong: the module and the micro-batch whose output or gradient is not finite."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsllm.batches import MicroBatch
from dsllm.engine.build import Engine
from dsllm.engine.step import counted, forward, loss_factor
from dsllm.objectives import Objective

_PASSES = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first number of a step that is not finite."""

    passing: str
    """"forward" or "backward"."""
    where: str
    """The module, and which of its tensors."""
    micro_batch: int
    """From 0, within the step."""
    rank: int
    num_ranks: int
    """Ranks on which this micro-batch goes wrong."""

    def __str__(self) -> str:
        others = f" (and on {self.num_ranks - 1} other ranks)" if self.num_ranks > 1 else ""
        return f"{self.where}, in the {self.passing} pass of micro-batch {self.micro_batch} on rank {self.rank}{others}"


def find_not_finite(engine: Engine, batches: Sequence[MicroBatch], objective: Objective, seed: int) -> NotFinite | None:
    """Run a step's micro-batches once more and check every module's inputs, outputs and gradients; a collective call.

    Weights, optimizer state and the loss scale stay as they are. Gradients are left over: the engine must take no further
    step. The forward pass comes before the backward pass and, in the same pass, the lower rank before the higher.

    Returns:
        None where every module and micro-batch is finite: then only their sum is not.
    """
    factor = loss_factor(engine, len(batches), counted(engine, batches, objective))
    for index, batch in enumerate(batches):
        look = _Look()
        with torch.compiler.set_stance("force_eager"), look.listening(engine.module):  # compiled code calls no hooks
            loss = forward(engine, batch, objective, (seed, index)).loss_sum
            look.passing = "backward"
            engine.deepspeed.backward(loss * factor)
        found = engine.world.gather(look.found)
        wrong = [(_PASSES.index(item[0]), rank, item[1]) for rank, item in enumerate(found) if item is not None]
        if wrong:
            passing, rank, where = min(wrong)
            return NotFinite(passing=_PASSES[passing], where=where, micro_batch=index, rank=rank, num_ranks=len(wrong))
    return None


@dataclass
class _Look:
    """Hooks on one forward and backward pass that remember the first tensor that is not finite.

    That tensor names the culprit. Bad output after good inputs: the module itself. Bad inputs after good outputs: the
    arithmetic between two modules, in the module that contains both. In the backward pass inputs and outputs are exchanged.
    """

    passing: str = "forward"
    found: tuple[str, str] | None = None
    _handles: list[Any] = field(default_factory=list)

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module and parameter for the duration of the block."""
        for name, module in model.named_modules():
            if name:  # the model itself is the arithmetic between its parts
                self._handles += [
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    module.register_forward_hook(self._after(name)),
                ]
        for name, parameter in model.named_parameters():
            self._handles.append(parameter.register_hook(self._gradient(f"the gradient of {name}")))
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def _before(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, keywords: Any) -> None:
            for tensor in _floating((inputs, keywords)):
                self._keep(tensor, f"the arithmetic of {_around(name)}, on the way to {name}")
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient(f"the gradient of {name}'s input"))

        return look

    def _after(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _floating(output):
                self._keep(tensor, f"the output of {name}")
                if tensor.grad_fn is not None:  # called after the hooks of those who take this tensor as their input
                    where = f"the gradient of the arithmetic of {_around(name)}, on the way back to {name}"
                    self._handles.append(tensor.grad_fn.register_prehook(self._gradients(where)))

        return look

    def _gradient(self, where: str) -> Any:
        def look(gradient: Tensor) -> None:
            self._keep(gradient, where)

        return look

    def _gradients(self, where: str) -> Any:
        def look(gradients: tuple[Tensor | None, ...]) -> None:
            for gradient in gradients:
                if gradient is not None:
                    self._keep(gradient, where)

        return look

    def _keep(self, tensor: Tensor, where: str) -> None:
        if self.found is None and not bool(torch.isfinite(tensor.detach()).all()):
            self.found = (self.passing, where)


def _floating(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's arguments or results."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floating(item)
    elif isinstance(value, dict):
        yield from _floating(tuple(value.values()))


def _around(name: str) -> str:
    """The module that contains a module: the model contains the blocks, not the list that holds them."""
    parent = name.rpartition(".")[0]
    return parent if "." in parent else "the model"
