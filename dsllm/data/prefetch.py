"""Reads the micro-batches of the next step in a thread while the current step computes."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import torch

from dsllm.batches import MicroBatch
from dsllm.data.position import Position


class StepBatches(Protocol):
    """Micro-batches as a pure function of the position in the data."""

    def step(self, position: Position) -> Sequence[MicroBatch]:
        """This rank's micro-batches of the step that begins at a position."""
        ...


class Prefetch:
    """Delivers the same micro-batches as `batches.step`, and reads one step ahead.

        with Prefetch(batches) as ahead:
            while ...:
                next_position = position.after(num_samples)
                micro_batches = ahead.step(position, next_position)

    A wrong `next_position` costs time and nothing else: the thread drops the step that it read ahead, and reads the one
    that the call asks for. An error while reading ahead is raised by the call that requests that step, with its own type;
    if no call requests the step, nothing is raised. At most two steps are in memory: the caller's, and the next one.

    One thread does all the reading. It starts at the first step, so create the object after a fork. It ends with the block:
    leaving the block, by an error too, waits until the step that is being read is read.
    """

    def __init__(self, batches: StepBatches, *, enabled: bool = True, pin: bool = False):
        """
        Args:
            batches: reads the micro-batches. Inside the block only the thread calls it.
            enabled: False: read each step when a call requests it, without a thread.
            pin: copy the tensors into page-locked memory, from which a GPU copies faster and without the CPU. Document
                numbers are not copied, because the model reads them on the CPU.
        """
        self._batches = batches
        self._pin = pin
        # The executor joins its thread at the end. A daemon thread would still be reading when the interpreter ends.
        self._reader = ThreadPoolExecutor(1, "prefetch") if enabled else None
        self._ahead: tuple[Position, Future[list[MicroBatch]]] | None = None

    def step(self, position: Position, next_position: Position | None) -> list[MicroBatch]:
        """This rank's micro-batches of a step; waits until they are read.

        Args:
            position: where the step begins.
            next_position: where the next step will probably begin; it is read ahead. None: there is no next step.

        Raises:
            DataError: as `batches.step(position)`.
        """
        if self._reader is None:
            return self._read(position)
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != position:
            ahead = (position, self._reader.submit(self._read, position))
        micro_batches = ahead[1].result()
        if next_position is not None:
            self._ahead = (next_position, self._reader.submit(self._read, next_position))
        return micro_batches

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead = None
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: Position) -> list[MicroBatch]:
        micro_batches = list(self._batches.step(position))
        if self._pin:
            for i, batch in enumerate(micro_batches):
                micro_batches[i] = _pinned(batch)
        return micro_batches


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch in page-locked memory."""
    return dataclasses.replace(
        batch,
        inputs=_copy_pinned(batch.inputs),
        targets=_copy_pinned(batch.targets),
        weights=None if batch.weights is None else _copy_pinned(batch.weights),
        positions=None if batch.positions is None else _copy_pinned(batch.positions),
    )


def _copy_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A page-locked copy of a tensor. numpy copies it, with one thread; torch might start a team of threads here."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.numpy()[...] = tensor.numpy()
    return pinned
