"""Writes a folder that is complete or not there, also where an empty folder or an older one has its name."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import CheckpointError
from dsllm.files import publish_directory, sync_directory

IsOurs = Callable[[str], bool]
"""Whether a name is one of those that are written into the folder."""


@dataclass(frozen=True)
class _Names:
    """The hidden names that a folder's writing needs next to it. They are cleaned up by the next writing of the same folder."""

    folder: Path

    @property
    def aside(self) -> Path:
        """The new folder while it is written."""
        return self.folder.with_name(f".{self.folder.name}.exporting")

    @property
    def replaced(self) -> Path:
        """The old folder until the new one is in its place."""
        return self.folder.with_name(f".{self.folder.name}.replaced")

    @property
    def inside(self) -> Path:
        """The new files while they are written into an empty folder: it may be a mount, which cannot be renamed."""
        return self.folder / ".exporting"


@contextlib.contextmanager
def whole_folder(path: Path, last: str, is_ours: IsOurs, replace: bool) -> Iterator[Path]:
    """A folder to write files into; afterwards they are under `path`. After an error or a kill they are not.

    A link is followed. An empty folder is filled. A folder that was written before is replaced if that is wanted; it is away
    only between two renames, and after a kill there the next call brings it back.

    Args:
        last: the file without which the others are not taken for a whole
        is_ours: a folder that contains other names is never replaced

    Raises:
        CheckpointError: the folder exists and may not be replaced, or cannot be written.
    """
    folder = Path(os.path.realpath(path))
    if not folder.name:
        raise CheckpointError(f"{path}: is the root of the file system: name another folder")
    names = _Names(folder)
    try:
        _restore(names)
        fills = folder.is_dir() and _is_free(names, is_ours)
        if not fills and os.path.lexists(folder):
            _check_replaceable(path, folder, last, is_ours, replace)
        yield from _filled(names, last, is_ours) if fills else _renamed(names)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written: {error}") from error


def _restore(names: _Names) -> None:
    """Bring back the folder that was moved away, if the process was killed before the new one was in its place."""
    folder, old = names.folder, names.replaced
    if not old.is_dir():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not os.path.lexists(folder):
        old.rename(folder)


def _is_free(names: _Names, is_ours: IsOurs) -> bool:
    """Whether a folder is empty, or contains only what a killed process was filling it with."""
    entries = {entry.name for entry in names.folder.iterdir()}
    return not entries or (names.inside.name in entries and all(map(is_ours, entries - {names.inside.name})))


def _check_replaceable(path: Path, folder: Path, last: str, is_ours: IsOurs, replace: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{path}: is a file: name a folder")
    others = sorted(entry.name for entry in folder.iterdir() if not is_ours(entry.name) or not entry.is_file())
    known = (folder / last).is_file()
    if not known or (replace and others):
        named = f" (it contains {', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
        raise CheckpointError(
            f"{path}: exists already, is not empty{named} and not only an exported model: export to another folder, or move "
            "what is there away"
        )
    if not replace:
        raise CheckpointError(
            f"{path}: exists already and is not empty: remove it, export to another folder, or give --replace to replace the "
            "model in it"
        )


def _begin(aside: Path, path: Path) -> int:
    """Make a new folder in place of the one of a process that was killed; returns a descriptor that holds its lock.

    Raises:
        CheckpointError: another process is writing into it.
    """
    if aside.is_dir():
        os.close(_locked(aside, path))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return _locked(aside, path)


def _locked(aside: Path, path: Path) -> int:
    descriptor = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{path}: another process is writing it: wait for its end") from None
    except OSError:  # this file system has no locks
        pass
    return descriptor


def _renamed(names: _Names) -> Iterator[Path]:
    """Write next to the folder, then rename."""
    folder, aside, old = names.folder, names.aside, names.replaced
    lock = _begin(aside, folder)
    try:
        yield aside
        _settle(aside)
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # the new one was in its place when that process was killed
            folder.rename(old)
        publish_directory(aside, folder)
    finally:
        os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)
        _restore(names)
        shutil.rmtree(old, ignore_errors=True)


def _filled(names: _Names, last: str, is_ours: IsOurs) -> Iterator[Path]:
    """Write inside the folder, then move the files up, the last one last."""
    folder, inside = names.folder, names.inside
    if inside.is_dir():
        os.close(_locked(inside, folder))
        _remove_ours(folder, is_ours)
    lock = _begin(inside, folder)
    try:
        yield inside
        _settle(inside)
        for file in sorted(inside.iterdir(), key=lambda file: file.name == last):
            file.rename(folder / file.name)
        inside.rmdir()
        sync_directory(folder)
    except BaseException:
        _remove_ours(folder, is_ours)
        shutil.rmtree(inside, ignore_errors=True)  # it marks the other files as ours, so it goes last
        raise
    finally:
        os.close(lock)


def _remove_ours(folder: Path, is_ours: IsOurs) -> None:
    for entry in folder.iterdir():
        if is_ours(entry.name):
            entry.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Flush files to the disk, and give them the umask's permissions: safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(folder)
