"""How far the hosts' clocks are apart, measured through the ranks themselves."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dsllm.doctor.findings import Finding, Place, where
from dsllm.engine.processes.process_group import World

ROUNDS = 15
ADVICE_SECONDS = 1.0
ERROR_SECONDS = 60.0
"""Credentials begin to fail (munge allows 300 s), and files seem to come from the future."""


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """Clocks against rank 0's."""

    seconds: tuple[float, ...]
    """By rank; positive: ahead."""
    uncertainty: float
    """Seconds: the typical deviation of one reading."""


def measure_offsets(world: World, clock: Callable[[], float] = time.time, rounds: int = ROUNDS) -> Offsets:
    """All ranks read their clocks when a barrier lets them go, several times; a collective call."""
    rows = []
    for _ in range(rounds):
        world.barrier()
        rows.append(world.gather(clock()))
    differences = [[row[rank] - row[0] for row in rows] for rank in range(world.size)]
    seconds = tuple(statistics.median(own) for own in differences)
    deviations = [abs(value - middle) for own, middle in zip(differences, seconds, strict=True) for value in own]
    return Offsets(seconds=seconds, uncertainty=statistics.median(deviations))


def check_clocks(offsets: Mapping[Place, float]) -> Iterator[Finding]:
    """Clocks that are far from the middle one, so that a wrong clock of rank 0 is not blamed on the others."""
    middle = statistics.median_low(offsets.values())
    for place, offset in offsets.items():
        away = offset - middle
        if abs(away) > ADVICE_SECONDS:
            yield Finding(
                level="error" if abs(away) > ERROR_SECONDS else "advice",
                check="clock",
                where=where([place]),
                problem=f"the clock is {abs(away):.1f} s {'ahead of' if away > 0 else 'behind'} the others",
                action="start time synchronisation there (chronyd, or systemd-timesyncd)",
            )
