"""What a check found wrong, where, and what to do; and the places, rank by rank, that were looked at."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from dsllm.engine.processes.cores import as_list

Value = TypeVar("Value")

Level = Literal["error", "advice"]
"""error: a run here would fail, hang, compute something wrong, or waste a good part of the machines. advice: the rest."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    level: Level
    check: str
    """What was checked, in a word or two."""
    where: str
    """The ranks or hosts concerned."""
    problem: str
    action: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.level}: {self.check}, {self.where}: {self.problem}; {self.action}"


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """A rank, and the host it is on."""

    rank: int
    local_rank: int
    host: str


def where(places: Iterable[Place]) -> str:
    """The ranks with their hosts, in few words: "rank 3 on b", "ranks 0-7,9 on a, b"."""
    sorted_places = sorted(places)
    hosts = list(dict.fromkeys(place.host for place in sorted_places))
    shown = hosts if len(hosts) <= 4 else [*hosts[:3], f"{len(hosts) - 3} more hosts"]
    word = "rank" if len(sorted_places) == 1 else "ranks"
    return f"{word} {as_list(tuple(place.rank for place in sorted_places))} on {', '.join(shown)}"


def one_per_host(seen: Mapping[Place, Value]) -> dict[Place, Value]:
    """The lowest rank of each host: for what all ranks of a host share."""
    first: dict[str, Place] = {}
    for place in sorted(seen):
        first.setdefault(place.host, place)
    return {place: seen[place] for place in first.values()}


def differing(seen: Mapping[Place, str]) -> Iterator[tuple[str, list[Place], str]]:
    """Each value that is not the most common one, the ranks that have it, and the most common one."""
    if not seen:
        return
    usual = Counter(seen[place] for place in sorted(seen)).most_common(1)[0][0]
    for value in sorted(set(seen.values()) - {usual}):
        yield value, [place for place, own in seen.items() if own == value], usual
