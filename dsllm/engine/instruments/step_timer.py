"""Times the parts of an optimizer step and names them in profiles; communication is one part, wherever it happens."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import record_function

from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.processes.device import synchronize

PARTS = ("data", "forward", "backward", "communication", "optimizer")

_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced", "all_to_all_single", "barrier",
)  # fmt: skip
"""Methods of DeepSpeed's communication backend, through which all its collectives go."""


class StepTimer:
    """Seconds of this rank in each part of a step: a part's own time, without that of the parts inside it.

    Switched off, it measures nothing and only names the parts for the profiler.

    Args:
        device: on GPUs work is queued, so the queue is emptied at both ends of every part. Communication and computation
            then wait for each other: the parts are exact, the step is slower
        on: measure
    """

    def __init__(self, device: torch.device, on: bool):
        self.device, self.on = device, on
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = 0.0  # seconds of finished parts inside the current one

    def start_step(self) -> None:
        """Forget the last step."""
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as this part, without the blocks inside it."""
        if not self.on:
            with record_function(name):
                yield
            return
        outside, self._inside = self._inside, 0.0
        synchronize(self.device)
        began = time.perf_counter()
        with record_function(name):
            yield
            synchronize(self.device)
        elapsed = time.perf_counter() - began
        self.seconds[name] += elapsed - self._inside
        self._inside = outside + elapsed


UNTIMED = StepTimer(torch.device("cpu"), on=False)
"""For a step that is not timed."""


@contextlib.contextmanager
def timing(device: torch.device, on: bool) -> Iterator[StepTimer]:
    """A timer that also sees the collectives inside DeepSpeed's forward, backward and step, while the block runs."""
    timer = StepTimer(device, on)
    if not on:
        yield timer
        return
    backend = deepspeed.comm.comm.cdb
    for name in _COLLECTIVES:  # as attributes of the object, before the class's methods
        setattr(backend, name, _timed(timer, getattr(backend, name)))
    try:
        yield timer
    finally:
        for name in _COLLECTIVES:
            delattr(backend, name)


def _timed(timer: StepTimer, collective: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        with timer.part("communication"):
            work = collective(*arguments, **named)
        return None if work is None else _TimedWork(timer, work)

    return timed


class _TimedWork:
    """A collective under way: waiting for it is communication too."""

    def __init__(self, timer: StepTimer, work: Any):
        self._timer, self._work = timer, work

    def wait(self, *arguments: Any) -> Any:
        """Wait for its end."""
        with self._timer.part("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
