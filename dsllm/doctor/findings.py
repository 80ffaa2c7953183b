"""What a check finds: the problem, the ranks or hosts that have it, and what to do about it."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from dsllm.engine.processes.cores import as_list

Value = TypeVar("Value")

Level = Literal["error", "advice"]
"""error: a run here would fail, hang, compute wrong numbers, or waste much of the machines. advice: any other problem."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem."""

    level: Level
    check: str
    """What was checked, in a word or two."""
    where: str
    """The ranks or hosts that have the problem."""
    problem: str
    action: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.level}: {self.check}, {self.where}: {self.problem}; {self.action}"


def check(name: str, where: str, level: Level | None, problem: str, action: str) -> Iterator[Finding]:
    """A row in a table of checks; yields the finding if there is one.

    Args:
        level: what is measured, compared with its thresholds by `below`, `above`, `error_if` or `advice_if`; None: no problem.
    """
    if level:
        yield Finding(level=level, check=name, where=where, problem=problem, action=action)


def below(value: float, *, error: float = -math.inf, advice: float = -math.inf) -> Level | None:
    """An error or advice if the value is below these thresholds."""
    return "error" if value < error else "advice" if value < advice else None


def above(value: float, *, error: float = math.inf, advice: float = math.inf) -> Level | None:
    """An error or advice if the value is above these thresholds."""
    return "error" if value > error else "advice" if value > advice else None


def error_if(condition: object) -> Level | None:
    """An error if the condition holds."""
    return "error" if condition else None


def advice_if(condition: object) -> Level | None:
    """Advice if the condition holds."""
    return "advice" if condition else None


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


def one_per_host(values: Mapping[Place, Value]) -> dict[Place, Value]:
    """The value of each host's lowest rank: for what all ranks of a host share."""
    first: dict[str, Place] = {}
    for place in sorted(values):
        first.setdefault(place.host, place)
    return {place: values[place] for place in first.values()}


def differing(values: Mapping[Place, str]) -> Iterator[tuple[str, list[Place], str]]:
    """Each value that is not the most common one, the ranks that have it, and the most common one."""
    if not values:
        return
    usual = Counter(values[place] for place in sorted(values)).most_common(1)[0][0]
    for value in sorted(set(values.values()) - {usual}):
        yield value, [place for place, own in values.items() if own == value], usual
