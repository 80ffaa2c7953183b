"""The folder in which a directory is prepared: used by one process at a time, then published by one rename."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsllm import files
from dsllm.data import manifest as manifests
from dsllm.data.manifest import Manifest
from dsllm.errors import DataError

CARD_FILE = "data_card.json"


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
    before, now = dict(_flat(manifest.settings)), dict(_flat(settings))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    changes = "\n".join(f"  {key}: was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
    raise DataError(
        f"{directory} was prepared with other settings:\n{changes}\n"
        "set another data.directory, or replace it by `dsllm prepare CONFIG --force`"
    )


def check_replaceable(directory: Path) -> None:
    """Check that prepared data can be published under this name without overwriting anything else.

    Raises:
        DataError: the directory is a file or a mount point, or it contains files that `prepare` did not write.
    """
    if directory.is_mount():
        raise DataError(
            f"data.directory {directory} is a mount point, and a rename cannot replace it: name a folder inside it"
        )
    if directory.exists() and not directory.is_dir():
        raise DataError(f"data.directory {directory} is a file: name a folder that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / manifests.FILE_NAME).exists():
        raise DataError(
            f"data.directory {directory} contains other files and no prepared data: name a folder that does not exist yet"
        )


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a tree of settings."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        yield path, tree
    for key, value in items:
        yield from _flat(value, f"{path}.{key}".lstrip("."))


@dataclass(frozen=True)
class Workspace:
    """The folders of one preparation. They survive an interruption, so that the next attempt can continue."""

    directory: Path
    """The folder to publish."""
    aside: Path
    """The folder to work in, renamed to `directory` at the end: shards and tokenizer/, until then also spool/ and
    records/."""

    @property
    def lock(self) -> Path:
        """The lock file. It is outside `aside`, so that an attempt that is refused changes nothing in there."""
        return self.aside.with_name(self.aside.name + ".lock")

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
        check_replaceable(self.directory)  # again: reading the sources may have taken hours
        keep = {f"{name}{suffix}" for name in shard_names for suffix in (".bin", ".idx")}
        keep |= {self.tokenizer.name, manifests.FILE_NAME, manifests.CHECKSUM_FILE, CARD_FILE}
        for path in list(self.aside.iterdir()):
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        replaced = self.directory.with_name(self.directory.name + ".replaced")
        if (self.directory / manifests.FILE_NAME).exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.directory, replaced)
        files.publish_directory(self.aside, self.directory)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def open_workspace(directory: Path, report: Callable[[str], None]) -> Iterator[Workspace]:
    """The workspace of a directory, locked until the end of the block.

    Raises:
        DataError: another process is preparing the same directory, or the folder cannot be written.
    """
    workspace = Workspace(directory, directory.with_name(directory.name + ".partial"))
    with _locked(workspace, report):
        try:
            shutil.rmtree(workspace.spool, ignore_errors=True)  # a killed attempt leaves it behind
            workspace.spool.mkdir(parents=True)
            workspace.records.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(workspace, workspace.aside, error) from error
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace.spool, ignore_errors=True)
            if workspace.records.is_dir() and not any(workspace.records.iterdir()):  # nothing to continue from
                shutil.rmtree(workspace.aside, ignore_errors=True)


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
    try:
        workspace.lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(workspace.lock, "a+", encoding="utf-8")  # noqa: SIM115 - `_locked` closes it
        files.hold_lock(file)
    except files.HeldElsewhereError as error:
        file.close()
        raise DataError(
            f"data.directory {workspace.directory} is being prepared already ({error}): wait for it, "
            "or set another data.directory"
        ) from None
    except files.LocksUnsupportedError as error:
        report(f"cannot lock {error}: make sure that no other process prepares {workspace.directory}")
        return file
    except OSError as error:
        raise _not_writable(workspace, workspace.lock, error) from error
    try:
        if os.path.samestat(os.fstat(file.fileno()), workspace.lock.stat()):
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None


def _not_writable(workspace: Workspace, path: Path, error: OSError) -> DataError:
    return DataError(f"data.directory {workspace.directory}: {path} cannot be written: {error.strerror}")
