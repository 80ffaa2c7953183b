"""Shows where the time of a step goes: columns in each step's row, and a table over all ranks at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsllm.engine.instruments.step_timer import PARTS, StepTimer

_COLUMNS = (*PARTS, "other")


@dataclass
class Breakdown:
    """Time of each part of this rank's steps in one attempt. The means leave out the first step, unless it is the only one."""

    timer: StepTimer
    num_steps: int = field(init=False, default=0)
    seconds: dict[str, float] = field(init=False, default_factory=lambda: dict.fromkeys(_COLUMNS, 0.0))

    def columns(self, step_seconds: float) -> dict[str, float]:
        """Seconds of each part of the last step, which add up to the whole step; empty where the timer is off."""
        if not self.timer.on:
            return {}
        parts = self.timer.seconds | {"other": step_seconds - sum(self.timer.seconds.values())}
        if self.num_steps == 1:
            self.seconds = dict.fromkeys(_COLUMNS, 0.0)
        self.num_steps += 1
        self.seconds = {name: self.seconds[name] + parts[name] for name in _COLUMNS}
        return {f"{name}_seconds": parts[name] for name in _COLUMNS}

    def means(self) -> dict[str, float]:
        """Seconds per step, by part."""
        return {name: seconds / max(1, self.num_steps - 1) for name, seconds in self.seconds.items()}


def table(of_ranks: Sequence[Mapping[str, float]]) -> str:
    """Mean milliseconds per step of each part: the mean over ranks, and which rank spent most and least there.

    A slow rank spends most in one of the parts, while the others wait for it in communication.
    """
    num_ranks, whole = len(of_ranks), sum(sum(means.values()) for means in of_ranks)
    lines = [f"{'part of a step':<14} {'ms':>9} {'share':>6}" + ("   most, least" if num_ranks > 1 else "")]
    for name in _COLUMNS:
        values = [means[name] for means in of_ranks]
        line = f"{name:<14} {1000 * sum(values) / num_ranks:>9.2f} {sum(values) / whole if whole else 0:>6.1%}"
        if num_ranks > 1:
            most, least = max(values), min(values)
            line += (
                f"   {1000 * most:.2f} on rank {values.index(most)}, {1000 * least:.2f} on rank {values.index(least)}"
            )
        lines.append(line)
    return "\n".join(lines)
