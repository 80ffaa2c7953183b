"""Compares a run with the one that was saved: what may change on resume, and what may not."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsllm.config.run import RunConfig

_MISSING = "(absent)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One field that differs."""

    field: str
    saved: Any
    current: Any
    changeable: bool

    def __str__(self) -> str:
        return f"{self.field}: saved {self.saved!r}, now {self.current!r}"


def differences(saved: RunConfig, current: RunConfig) -> list[Difference]:
    """Every field in which two runs differ, in the order of the tree."""
    return _compare(saved, current, "", False)


def belongs_to_another_run(directory: Path, owner: object, name: str) -> str:
    """The message for a run directory that another run has begun.

    Args:
        owner: the name of the run that has begun it
        name: of the run that wants it
    """
    return f"{directory}: belongs to the run '{owner}', not to '{name}': set another run.directory"


def refusal(refused: Sequence[Difference], where: Path) -> str:
    """Why a run may not continue from a checkpoint: what differs and may not, and how to start a new run from it."""
    return (
        f"{where} belongs to a run that differs in:\n"
        + "\n".join(f"- {difference}" for difference in refused)
        + "\nTo continue that run, undo these changes. To start a new run from its weights, set another run.directory and "
        + f"model.init_from={where}"
    )


def _compare(saved: Any, current: Any, path: str, may_change: bool) -> list[Difference]:
    if dataclasses.is_dataclass(saved) and type(saved) is type(current):
        found = []
        for f in dataclasses.fields(saved):
            inner = may_change or bool(f.metadata.get("changeable"))
            found += _compare(getattr(saved, f.name), getattr(current, f.name), f"{path}.{f.name}".lstrip("."), inner)
        return found
    if isinstance(saved, tuple) and isinstance(current, tuple):
        found = []
        for i in range(max(len(saved), len(current))):
            left = saved[i] if i < len(saved) else _MISSING
            right = current[i] if i < len(current) else _MISSING
            found += _compare(left, right, f"{path}.{i}", may_change)
        return found
    return [] if saved == current else [Difference(path, saved, current, may_change)]
