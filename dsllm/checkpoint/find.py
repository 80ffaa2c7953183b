"""Finds the checkpoints of a run: which there are, the newest sound one, and which are no longer needed."""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from dsllm.checkpoint.manifest import MANIFEST_FILE
from dsllm.checkpoint.read_manifest import UnavailableCheckpointError, read_manifest
from dsllm.checkpoint.verify import damage_in
from dsllm.errors import CheckpointError
from dsllm.run_directory import CHECKPOINTS
from dsllm.untrusted_files import check_regular

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
    """Published checkpoints in a folder, newest (most steps) first; damaged ones too, but no folder of other things."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if re.fullmatch(r"step-\d+", p.name) and p.is_dir() and not _is_stray(p)]
    return sorted(found, key=step_of, reverse=True)


def _is_stray(folder: Path) -> bool:
    """Whether a folder has a checkpoint's name and other things in it; one that cannot be listed may be a checkpoint."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    return bool(names) and not any(name == MANIFEST_FILE or name.endswith(".safetensors") for name in names)


def looks_sound(folder: Path) -> bool:
    """Whether a checkpoint has the sound manifest of its step, and all files in their sizes. Reads the manifest alone."""
    try:
        manifest = read_manifest(folder)
        return manifest.progress["step"] == step_of(folder) and all(
            check_regular(folder / file.name) == file.num_bytes for file in manifest.files("all")
        )
    except (OSError, CheckpointError, ValueError):  # ValueError: not a regular file, or the folder's name has no step
        return False


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
    checkpoints: Sequence[Path],
    published: Path,
    damaged: Collection[Path],
    keep_last: int,
    keep_every_steps: int,
    sound: Callable[[Path], bool] = lambda folder: True,
) -> list[Path]:
    """The checkpoints that are no longer needed once `published` exists.

    Of earlier steps only, what is older than the newest `keep_last - 1` sound ones, except the multiples of
    `keep_every_steps`; and the damaged ones, by name: they neither count nor stay.

    Args:
        sound: whether a checkpoint counts as one that is kept; asked until enough are found
    """
    earlier = [folder for folder in checkpoints if step_of(folder) < step_of(published) and folder not in damaged]
    earlier.sort(key=step_of, reverse=True)
    place, num_kept = 0, 1
    while place < len(earlier) and num_kept < keep_last:
        num_kept += sound(earlier[place])
        place += 1
    found = [folder for folder in earlier[place:] if not (keep_every_steps and step_of(folder) % keep_every_steps == 0)]
    return found + [folder for folder in checkpoints if folder in damaged and folder != published]


def remove_checkpoints(folders: Sequence[Path]) -> list[str]:
    """Remove checkpoints; returns what went wrong, because a failure here must not end a run that is saved.

    Of a link only the link is removed. A folder that is no checkpoint, or that of another step than its name says, stays.
    """
    problems = []
    for folder in folders:
        reason = _not_ours(folder)
        if reason:
            problems.append(f"{folder}: is not removed: {reason}")
            continue
        try:
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(hide(folder))
        except OSError as error:
            problems.append(f"{folder}: could not be removed: {error.strerror or error}")
    return problems


def _not_ours(folder: Path) -> str:
    """Why a folder may be something else than a checkpoint that this run has saved; empty: it is one."""
    if folder.is_symlink():
        return ""
    if _is_stray(folder):
        return "it is no checkpoint"
    try:
        step = read_manifest(folder).progress["step"]
    except UnavailableCheckpointError as error:
        return f"it may be sound: {error}"
    except CheckpointError:
        return ""  # damaged, or gone already
    return "" if step == step_of(folder) else f"it is a copy of step {step}"


def put_aside(folder: Path) -> str:
    """Rename what is in the way of a checkpoint that is about to be published; returns a line for the user.

    A damaged checkpoint of the same step is hidden as a leftover, without a word; anything else stays under another name.
    """
    if folder.is_dir() and not folder.is_symlink() and not _not_ours(folder):
        hide(folder)
        return ""
    aside = folder.rename(_free_name(folder, "replaced"))
    return f"{folder}: was in the way of a checkpoint and is now {aside.name}"


def hide(folder: Path) -> Path:
    """Rename a checkpoint that is about to be removed, so that half of it is never taken for a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.removing")
    _remove(hidden)  # left by a kill
    return folder.rename(_free_name(folder.with_name(f".{folder.name}"), "removing"))


def remove_leftovers(directory: Path) -> None:
    """Remove what saves and removals that were killed have left. Nothing may be saving into the folder."""
    for pattern in (".step-*.partial*", ".step-*.removing*"):
        for leftover in directory.glob(pattern):
            _remove(leftover)


def new_folder(path: Path, ending: str) -> Path:
    """Make the folder PATH.ENDING, or one with a number after it if something that cannot be removed is there."""
    made = _free_name(path, ending)
    made.mkdir(parents=True)
    return made


def _free_name(path: Path, ending: str) -> Path:
    """PATH.ENDING, or with the first number after it that is free."""
    names = itertools.chain(
        [f"{path.name}.{ending}"], (f"{path.name}.{ending}-{number}" for number in itertools.count(2))
    )
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def _remove(path: Path) -> None:
    """Remove a folder with its content, a file or a link, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
