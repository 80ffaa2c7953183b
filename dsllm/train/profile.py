"""Profiles a few steps of a run: counts FLOPs and bytes in one step, then traces the steps after it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsllm.counts import Communication
from dsllm.engine.instruments.operator_counts import Counting
from dsllm.errors import RunError
from dsllm.session.progress import Progress

_TOP_OPERATORS = 10
_WARM_UP_STEPS = 4
_STEPS = 3


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps of the run, numbered from 1 as in metrics.jsonl; the one before the first is counted."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the formulas of dsllm/counts expect of one step on one rank."""

    flops: float
    communication: Communication
    ranks: int
    compiled: bool
    """Compiled layers hide their operators from counting."""


def steps_to_profile(text: str, done: int, num_steps: int) -> ProfiledSteps:
    """Parse `FIRST:LAST`; an empty text means three steps after four that warm up.

    Args:
        done: steps that the run has taken already
        num_steps: of the whole run
    Raises:
        RunError: the text is not FIRST:LAST, or this attempt does not take these steps.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text or f"{done + _WARM_UP_STEPS + 1}:{done + _WARM_UP_STEPS + _STEPS}")
    if match is None:
        raise RunError(f"--profile {text}: write it as FIRST:LAST, two steps of the run, for example --profile 5:7")
    first, last = int(match[1]), int(match[2])
    if not done + 2 <= first <= last <= num_steps:
        raise RunError(
            f"--profile {first}:{last}: this attempt takes the steps {done + 1} to {num_steps}; FIRST must be at least "
            f"{done + 2} (the step before it is counted), and LAST at most {num_steps}"
        )
    return ProfiledSteps(first, last)


def check_profile_steps(text: str | None, num_steps: int) -> Callable[[Progress], None]:
    """The preflight check of --profile: raises RunError if this attempt does not take the steps."""

    def check(progress: Progress) -> None:
        if text is not None and progress.step < num_steps:
            steps_to_profile(text, progress.step, num_steps)

    return check


@dataclass
class Profile:
    """Counts and traces steps while the loop takes them. Does nothing without steps.

    Every rank writes a trace, RUN/profile/steps-FIRST-LAST-rank-R.pt.trace.json: for Perfetto, chrome://tracing and
    TensorBoard's profiler.
    """

    steps: ProfiledSteps | None
    folder: Path
    rank: int
    expected: Expected
    report: Callable[[str], None]
    _counting: Counting | None = field(init=False, default=None)
    _tracing: Any = field(init=False, default=None)

    def before(self, step: int) -> None:
        """Called before a step is taken."""
        if self.steps is None:
            return
        if step == self.steps.first - 1:
            self._counting = Counting()
            self._counting.__enter__()
        if step == self.steps.first:
            self._tracing = torch.profiler.profile(record_shapes=True)
            self._tracing.start()

    def after(self, step: int) -> None:
        """Called when it has been taken."""
        if self.steps is None:
            return
        if step == self.steps.first - 1 and self._counting is not None:
            self._counting.__exit__(None, None, None)
        if step == self.steps.last and self._tracing is not None:
            self._tracing.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tracing.export_chrome_trace(str(self.trace))
            self.report(self._summary())

    @property
    def trace(self) -> Path:
        """This rank's trace."""
        assert self.steps is not None
        return self.folder / f"steps-{self.steps.first}-{self.steps.last}-rank-{self.rank}.pt.trace.json"

    def _summary(self) -> str:
        """The operators that took longest, and what was counted next to what the formulas expect."""
        assert self.steps is not None and self._counting is not None
        return "\n".join(
            [
                f"profile of rank {self.rank}, steps {self.steps.first} to {self.steps.last}: {self.trace}",
                *_top_operators(self._tracing, self.steps.last - self.steps.first + 1),
                *_next_to_the_formulas(self._counting, self.expected, self.steps.first - 1),
            ]
        )


def _top_operators(tracing: Any, num_steps: int) -> list[str]:
    """The operators that took most time by themselves: on the GPU if there is one."""
    averages = tracing.key_averages()
    on_device = any(event.self_device_time_total for event in averages)
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    rows = sorted(averages, key=lambda event: getattr(event, name), reverse=True)
    total = sum(getattr(event, name) for event in rows) or 1.0
    where = "GPU" if on_device else "CPU"
    lines = [f"{where + ' time of its own':<44} {'calls a step':>12} {'ms a step':>10} {'share':>6}"]
    for event in rows[:_TOP_OPERATORS]:
        microseconds = getattr(event, name)
        lines.append(
            f"{event.key[:44]:<44} {event.count / num_steps:>12.1f} {microseconds / num_steps / 1000:>10.2f} "
            f"{microseconds / total:>6.1%}"
        )
    return lines


def _next_to_the_formulas(counting: Counting, expected: Expected, step: int) -> list[str]:
    measured, formula = counting.parameter_flops + counting.attention_flops, expected.flops
    flops = (
        f"GFLOP {measured / 1e9:.3f} ({counting.parameter_flops / 1e9:.3f} with parameters, "
        f"{counting.attention_flops / 1e9:.3f} attention), by formula {formula / 1e9:.3f}"
    )
    if expected.compiled:
        flops = f"GFLOP not counted (compiled layers hide their operators), by formula {formula / 1e9:.3f}"
    by_kind = ", ".join(f"{kind} {size / 1e6:.3f}" for kind, size in sorted(counting.communication_bytes.items()))
    by_formula = expected.communication
    return [
        f"counted in step {step}, for this rank:",
        f"  {flops}",
        f"  MB given to collectives {counting.communication_bytes.total() / 1e6:.3f} ({by_kind or 'none'}), by formula "
        f"{by_formula.handed / 1e6:.3f} ({by_formula.on_wire(expected.ranks) / 1e6:.3f} sent with ring algorithms)",
    ]
