"""How far apart the hosts' clocks are, measured through the ranks themselves."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dsllm.doctor.findings import Finding, Place, above, check, where
from dsllm.engine.processes.process_group import World

ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """Clocks against rank 0's."""

    seconds: tuple[float, ...]
    """By rank. Positive: the clock is ahead."""
    uncertainty: float
    """Typical deviation of one reading, in seconds."""


def measure_offsets(world: World, clock: Callable[[], float] = time.time, rounds: int = ROUNDS) -> Offsets:
    """Read every rank's clock as it leaves a barrier, several times. A collective call."""
    rows = []
    for _ in range(rounds):
        world.barrier()
        rows.append(world.gather(clock()))
    differences = [[row[rank] - row[0] for row in rows] for rank in range(world.size)]
    seconds = tuple(statistics.median(own) for own in differences)
    deviations = [abs(value - median) for own, median in zip(differences, seconds, strict=True) for value in own]
    return Offsets(seconds=seconds, uncertainty=statistics.median(deviations))


# fmt: off
# One row per check: name, where, level, problem, action.
def check_clocks(offsets: Mapping[Place, float]) -> Iterator[Finding]:
    """Check each clock against the median one, so that a wrong clock of rank 0 is not blamed on the others."""
    median = statistics.median_low(offsets.values())
    for place, offset in offsets.items():
        ahead = offset - median
        # beyond a minute credentials begin to fail (munge allows 300 s), and files seem to come from the future
        yield from check("clock", where([place]), above(abs(ahead), error=60.0, advice=1.0),
            f"the clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the others",
            "start time synchronisation there (chronyd, or systemd-timesyncd)")
