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
    """Delivers what `batches.step` delivers, and reads one step ahead.

        with Prefetch(batches) as ahead:
            while ...:
                next_position = position.after(num_samples)
                micro_batches = ahead.step(position, next_position)

    A wrong `next_position` costs time and nothing else: what was read ahead is dropped, and the position that is asked
    for is read then. An error while reading ahead is raised by the call that asks for that position, with its own type;
    if no call asks for it, it is dropped too. At most two steps are in memory: the caller's, and the next one.

    One thread does all the reading; it starts with the first step and ends with the block, after the read that it is
    in. With several processes on a host, enter the block in each of them, after the fork.
    """

    def __init__(self, batches: StepBatches, *, enabled: bool = True, pin: bool = False):
        """
        Args:
            batches: where the micro-batches are read. While the block runs, only the thread may call it.
            enabled: False: read each step when it is asked for, without a thread.
            pin: copy the tensors into page-locked memory, from which a GPU copies faster and without the CPU. Document
                numbers stay as they are: the model reads them on the CPU.
        """
        self._batches = batches
        self._pin = pin
        # Not a daemon thread: the interpreter would end under it while it reads.
        self._reader = ThreadPoolExecutor(1, "prefetch") if enabled else None
        self._ahead: tuple[Position, Future[list[MicroBatch]]] | None = None

    def step(self, position: Position, next_position: Position | None) -> list[MicroBatch]:
        """This rank's micro-batches of a step. Waits for as long as they are not read yet.

        Args:
            position: where the step begins.
            next_position: where the next step will begin, to read it ahead. None: there is no next step.

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
