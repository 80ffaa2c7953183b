"""The folder in which a directory is prepared: used by one process at a time, then published by one rename."""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsllm import files
from dsllm.data import manifest as manifests
from dsllm.data.manifest import Manifest
from dsllm.errors import DataError
from dsllm.prepare.document import shown
from dsllm.prepare.settings import other_settings
from dsllm.untrusted_files import UntrustedFileError, read_json

CARD_FILE = "data_card.json"
MANIFEST_FILES = (manifests.FILE_NAME, manifests.CHECKSUM_FILE)
"""The manifest, and its checksum where there is one."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room: on the disk, in the user's quota, or within the limit on a file's size."""


def prepared_before(directory: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a directory that was prepared with the same settings; None if it has not been prepared.

    Raises:
        DataError: the directory was prepared with other settings, or its manifest is damaged.
    """
    if not (directory / manifests.FILE_NAME).exists():
        return None
    manifest = manifests.load_manifest(directory)
    if manifest.settings_sha256 == manifests.hash_of(settings):
        return manifest
    raise other_settings(directory, manifest, settings)


def real_directory(directory: Path) -> Path:
    """The folder that data.directory names: where a link leads, because a rename would replace the link itself.

    Raises:
        DataError: the link leads in a circle, or it is not a path.
    """
    try:
        real = Path(os.path.realpath(directory))
        is_link = directory.is_symlink()
    except ValueError as error:
        raise DataError(f"data.directory {shown(directory)} is not a path: {error}") from error
    if real.is_symlink():
        raise DataError(f"data.directory {directory} is a link that leads in a circle: name a folder")
    return real if is_link or directory.name in ("", "..") else directory


def check_replaceable(directory: Path, force: bool = False) -> None:
    """Check that prepared data can be published under this name without overwriting anything else.

    Args:
        force: replace prepared data, also where its manifest is missing.

    Raises:
        DataError: the directory is a file or a mount point, or it contains files that `prepare` did not write.
        OSError: it cannot be looked at.
    """
    if Path(os.path.realpath(directory)).is_mount():
        raise DataError(
            f"data.directory {directory} is a mount point, and a rename cannot replace it: name a folder inside it"
        )
    if Path.cwd().is_relative_to(os.path.realpath(directory)):
        raise DataError(f"data.directory {directory} contains the working directory: name a folder of its own")
    if directory.exists() and not directory.is_dir():
        raise DataError(f"data.directory {directory} is a file: name a folder that does not exist yet")
    names = _names_in(directory)
    if not names:
        return
    if others := shown(_some([name for name in names if not _OWN_NAME.fullmatch(name)])):
        raise DataError(
            f"data.directory {directory} contains other files and no prepared data ({others}): name a new folder"
            if manifests.FILE_NAME not in names
            else f"data.directory {directory} contains other files next to the prepared data ({others}): move them away first"
        )
    if manifests.FILE_NAME not in names and not force:
        raise DataError(
            f"data.directory {directory} contains token shards, but no {manifests.FILE_NAME}: copy that file too, or the whole "
            "folder again; or replace the data by `dsllm prepare CONFIG --force`"
        )


_OWN_NAME = re.compile(
    rf"(({'|'.join(map(re.escape, (CARD_FILE, *MANIFEST_FILES)))}|(train|validation)-.+\.(bin|idx))(\.partial)?)"
    r"|tokenizer|spool|records"
)
"""Names that `prepare` gives to what it writes."""


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Workspace:
    """The folders of one preparation. They survive an interruption, so that the next attempt can continue."""

    directory: Path
    """The folder to publish."""
    aside: Path
    """The folder to work in, renamed to `directory` at the end: shards and tokenizer/, until then also spool/ and
    records/."""
    force: bool = False
    """Replace prepared data, also where its manifest is missing."""

    @property
    def lock(self) -> Path:
        """The lock file. It is outside `aside`, so that an attempt that is refused changes nothing in there."""
        return self.aside.with_name(self.aside.name + ".lock")

    @property
    def replaced(self) -> Path:
        """What the folder contained before, until the new content has its name."""
        return self.directory.with_name(self.directory.name + ".replaced")

    @property
    def spool(self) -> Path:
        """Texts that wait to be tokenised."""
        return self.aside / "spool"

    @property
    def records(self) -> Path:
        """One JSON file for each finished shard and for the trained tokenizer."""
        return self.aside / "records"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.aside / "tokenizer"

    def publish(self, shard_names: set[str]) -> None:
        """Remove everything that is not part of the result, and rename the folder to its final name.

        Raises:
            DataError: other files have appeared under the final name.
            OSError: the disk is full, or a rename failed.
        """
        check_replaceable(self.directory, force=self.force)  # again: reading the sources may have taken hours
        keep = {f"{name}{suffix}" for name in shard_names for suffix in (".bin", ".idx")}
        keep |= {self.tokenizer.name, CARD_FILE, *MANIFEST_FILES}
        for path in list(self.aside.iterdir()):
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        replaces = bool(_names_in(self.directory))
        if replaces:
            shutil.rmtree(self.replaced, ignore_errors=True)
            os.rename(self.directory, self.replaced)
        try:
            files.publish_directory(self.aside, self.directory)
        except OSError:
            if replaces and not self.directory.exists():
                os.rename(self.replaced, self.directory)
            raise
        shutil.rmtree(self.replaced, ignore_errors=True)


@contextmanager
def open_workspace(directory: Path, report: Callable[[str], None], force: bool = False) -> Iterator[Workspace]:
    """The workspace of a directory, locked until the end of the block.

    Args:
        directory: not a link (`real_directory`).
        force: replace prepared data, also where its manifest is missing.

    Raises:
        DataError: another process is preparing the same directory, the folder cannot be written, or a folder of the user
            has the name that ours needs.
    """
    workspace = Workspace(directory, directory.with_name(directory.name + ".partial"), force)
    with _locked(workspace, report):
        try:
            _check_own(workspace)
            shutil.rmtree(workspace.spool, ignore_errors=True)  # a killed attempt leaves it behind
            workspace.spool.mkdir(parents=True)
            workspace.records.mkdir(exist_ok=True)
        except OSError as error:
            raise not_written(workspace.directory, error) from error
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace.spool, ignore_errors=True)
            if workspace.records.is_dir() and not any(workspace.records.iterdir()):  # nothing to continue from
                shutil.rmtree(workspace.aside, ignore_errors=True)


def _check_own(workspace: Workspace) -> None:
    """Refuse to work in, or to remove, a folder that contains what `prepare` did not write."""
    for folder in (workspace.aside, workspace.replaced):
        others = [name for name in _names_in(folder) if not _OWN_NAME.fullmatch(name)]
        if others or folder.is_symlink():
            why = f"contains other files ({shown(_some(others))})" if others else "is a link"
            raise DataError(
                f"{folder} {why}, but preparing {workspace.directory} needs this name: move it away, or set another "
                "data.directory"
            )


@contextmanager
def _locked(workspace: Workspace, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the workspace's lock until the end of the block, then remove the lock file."""
    while (file := _lock_file(workspace, report)) is None:
        pass
    with file:
        try:
            yield
        finally:
            workspace.lock.unlink(missing_ok=True)  # while we still hold it: see `_lock_file`


def _lock_file(workspace: Workspace, report: Callable[[str], None]) -> IO[str] | None:
    """The locked file; None if its last holder removed it before we locked it, so that a new one must be opened."""
    file: IO[str] | None = None
    try:
        workspace.lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(workspace.lock, "a+", encoding="utf-8", errors="replace", opener=_no_link)  # noqa: SIM115 - `_locked` closes it
        files.hold_lock(file)
    except files.HeldElsewhereError as error:
        if file is not None:
            file.close()
        raise DataError(
            f"data.directory {workspace.directory} is being prepared already ({error}): wait for it, "
            "or set another data.directory"
        ) from None
    except files.LocksUnsupportedError as error:
        report(f"cannot lock {error}: make sure that no other process prepares {workspace.directory}")
        return file
    except OSError as error:
        if file is not None:
            if error.errno in DISK_FULL:  # it is locked, but there is no room for the line in it
                workspace.lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.close()
        error.filename = error.filename or str(workspace.lock)
        raise not_written(workspace.directory, error) from error
    try:
        if os.path.samestat(os.fstat(file.fileno()), workspace.lock.stat()):
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None


def _no_link(path: str, flags: int) -> int:
    """Open a file unless it is a link, whose target would be emptied, or a pipe or device.

    Raises:
        OSError: it is one, or it cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a pipe or a device", path)
    return descriptor


def content_of(record: Path) -> Any:
    """The content of a JSON file of an interrupted preparation; None if it is damaged."""
    try:
        return read_json(record)
    except (OSError, UntrustedFileError):
        return None


def not_written(directory: Path, error: OSError, verb: str = "written") -> DataError:
    """The error that a file or folder of a preparation could not be written: which, why, and what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            verb, why = "written", "the disk is full; free some space and start again: finished shards are kept"
        case errno.EFBIG:
            verb, why = "written", "it is larger than a file may be here; raise that limit (ulimit -f), and start again"
        case _:
            why = f"{error.strerror or error}; change that, or set another data.directory"
    return DataError(f"data.directory {directory}: {shown(error.filename or directory)} cannot be {verb}: {why}")
