"""Finds the checkpoints of a run: which there are, the newest sound one, and which are no longer needed."""

import re
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from dsllm.checkpoint.manifest import MANIFEST_FILE
from dsllm.checkpoint.verify import damage_in
from dsllm.errors import CheckpointError
from dsllm.run_directory import CHECKPOINTS

Report = Callable[[str], None]
"""Shows a line to the user."""
Damage = Callable[[Path], str | None]
"""What is wrong with a checkpoint; None: nothing."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; sorts by step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Optimizer steps taken when the checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints in a folder, newest (most steps) first."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path may mean, newest first: a checkpoint's own folder, or those of a run directory.

    Raises:
        CheckpointError: it is neither.
    """
    if (path / MANIFEST_FILE).is_file() and not (path / CHECKPOINTS).is_dir():
        return [path]
    found = list_checkpoints(path / CHECKPOINTS)
    if not found:
        raise CheckpointError(f"{path}: is neither a run directory with checkpoints nor a checkpoint")
    return found


def newest_sound(checkpoints: Sequence[Path], report: Report, damage: Damage) -> tuple[Path | None, list[Path]]:
    """The first of these checkpoints whose files verify, and the damaged ones before it. None: there are no checkpoints.

    Reads no folder listing, so ranks that are given the same list and share the work of `damage` agree on the answer.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[Path] = []
    for folder in checkpoints:
        problem = damage(folder)
        if problem is None:
            return folder, damaged
        report(f"checkpoint {folder} is damaged and skipped: {problem}")
        damaged.append(folder)
    if not checkpoints:
        return None, []
    raise CheckpointError(
        f"{checkpoints[0].parent}: none of the {len(checkpoints)} checkpoints verifies; restore one, or remove the folder "
        "to start over"
    )


def find_checkpoint(path: Path, report: Report) -> Path:
    """The checkpoint that a path means (see `candidates`), for reading its weights: only their files are verified.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    listed, damage = candidates(path), partial(damage_in, what="weights")
    if listed == [path]:
        problem = damage(path)
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        return path
    found, _ = newest_sound(listed, report, damage)
    assert found is not None, "candidates returns at least one checkpoint"
    return found


def obsolete(
    checkpoints: Sequence[Path], published: Path, damaged: Collection[Path], keep_last: int, keep_every_steps: int
) -> list[Path]:
    """The checkpoints that are no longer needed once `published` exists.

    Of the sound ones only those of earlier steps, except the newest `keep_last - 1` and the multiples of
    `keep_every_steps`; and the damaged ones, by name: they neither count nor stay.
    """
    earlier = [folder for folder in checkpoints if step_of(folder) < step_of(published) and folder not in damaged]
    earlier.sort(key=step_of, reverse=True)
    too_old = earlier[max(keep_last - 1, 0) :]
    found = [folder for folder in too_old if not (keep_every_steps and step_of(folder) % keep_every_steps == 0)]
    return found + [folder for folder in checkpoints if folder in damaged and folder != published]


def remove_checkpoints(folders: Sequence[Path]) -> list[str]:
    """Remove checkpoints; returns what went wrong, because a failure here must not end a run that is saved."""
    problems = []
    for folder in folders:
        try:
            shutil.rmtree(hide(folder))
        except OSError as error:
            problems.append(f"{folder}: could not be removed: {error.strerror or error}")
    return problems


def hide(folder: Path) -> Path:
    """Rename a checkpoint that is about to be removed, so that half of it is never taken for a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)  # left by a kill
    return folder.rename(hidden)


def remove_leftovers(directory: Path) -> None:
    """Remove what saves and removals that were killed have left. Nothing may be saving into the folder."""
    for pattern in (".step-*.partial", ".step-*.removing"):
        for leftover in directory.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
