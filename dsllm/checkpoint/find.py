"""Finds the checkpoints of a run: which there are, the newest that is sound, and which may go."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dsllm.checkpoint.manifest import MANIFEST_FILE
from dsllm.checkpoint.read import damage_in
from dsllm.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""Folder of a run directory that holds its checkpoints."""


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints in a folder, newest (most steps) first."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Optimizer steps taken when the checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def newest_sound(
    directory: Path, tell: Callable[[str], None], damage: Callable[[Path], str | None] = damage_in
) -> Path | None:
    """The newest checkpoint whose files verify; None if there is no checkpoint at all.

    A damaged one is passed over, and `tell` is told what is wrong with it.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    candidates = list_checkpoints(directory)
    for folder in candidates:
        problem = damage(folder)
        if problem is None:
            return folder
        tell(f"checkpoint {folder} is damaged and passed over: {problem}")
    if candidates:
        raise CheckpointError(
            f"{directory}: none of the {len(candidates)} checkpoints verifies; restore one, or remove the folder to start over"
        )
    return None


def find_checkpoint(path: Path, tell: Callable[[str], None]) -> Path:
    """The checkpoint meant by a path: a checkpoint's own folder, or a run directory (its newest sound one).

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST_FILE).is_file() and not (path / CHECKPOINTS).is_dir():
        problem = damage_in(path)
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        return path
    found = newest_sound(path / CHECKPOINTS, tell)
    if found is None:
        raise CheckpointError(f"{path}: is neither a run directory with checkpoints nor a checkpoint")
    return found


def retire(directory: Path, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Remove old checkpoints: all but the newest `keep_last` and those at multiples of `keep_every_steps`. Returns them.

    A folder is first renamed out of sight, so that one half removed is never taken for a checkpoint.
    """
    removed = []
    for folder in list_checkpoints(directory)[keep_last:]:
        if keep_every_steps and step_of(folder) % keep_every_steps == 0:
            continue
        hidden = folder.with_name(f".{folder.name}.removing")
        folder.rename(hidden)
        shutil.rmtree(hidden)
        removed.append(folder)
    return removed
