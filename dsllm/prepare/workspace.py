"""The folder beside a prepared directory in which the work is done: one process at a time, published by one rename."""

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
    """The manifest of a directory that was prepared with the same settings; nothing if it was not prepared.

    Raises:
        DataError: it was prepared with other settings, or its manifest is damaged.
    """
    if not (directory / manifests.FILE_NAME).exists():
        return None
    found = manifests.load_manifest(directory)
    if found.settings_sha256 == manifests.hash_of(settings):
        return found
    before, now = dict(_flat(found.settings)), dict(_flat(settings))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    changes = "\n".join(f"  {key}: was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
    raise DataError(
        f"{directory} was prepared with other settings:\n{changes}\n"
        "set another data.directory, or replace it by `dsllm prepare CONFIG --force`"
    )


def check_replaceable(directory: Path) -> None:
    """Refuse to put prepared data where something else lies.

    Raises:
        DataError: the directory is a file, a mount point, or holds what was not prepared.
    """
    if directory.is_mount():
        raise DataError(
            f"data.directory {directory} is a mount point, which cannot be published by a rename: name a folder in it"
        )
    if directory.exists() and not directory.is_dir():
        raise DataError(f"data.directory {directory} is a file: name a folder that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / manifests.FILE_NAME).exists():
        raise DataError(
            f"data.directory {directory} holds other files and no prepared data: name a folder that does not exist yet"
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
    """Where one preparation keeps what it has; survives an interruption."""

    directory: Path
    """What will be published."""
    aside: Path
    """What will become it: shards, tokenizer/, and while working spool/ and records/."""

    @property
    def spool(self) -> Path:
        """Texts that wait to be tokenised."""
        return self.aside / "spool"

    @property
    def records(self) -> Path:
        """What is finished, in JSON."""
        return self.aside / "records"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.aside / "tokenizer"

    def publish(self, shard_names: set[str]) -> None:
        """Remove all that is not part of the result, and rename the folder into place.

        Raises:
            OSError: the disk refuses.
        """
        keep = {f"{name}{suffix}" for name in shard_names for suffix in (".bin", ".idx")}
        keep |= {self.tokenizer.name, manifests.FILE_NAME, CARD_FILE}
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
    place = Workspace(directory, directory.with_name(directory.name + ".partial"))
    try:
        place.records.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place.spool, ignore_errors=True)
        file = open(place.aside / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the lock
    except OSError as error:
        raise DataError(f"data.directory {directory}: {place.aside} cannot be written: {error.strerror}") from error
    with file:
        _lock(file, place, report)
        place.spool.mkdir(exist_ok=True)
        try:
            yield place
        finally:
            shutil.rmtree(place.spool, ignore_errors=True)
            if place.records.is_dir() and not any(place.records.iterdir()):  # nothing was finished, nothing is kept
                shutil.rmtree(place.aside, ignore_errors=True)


def _lock(file: IO[str], place: Workspace, report: Callable[[str], None]) -> None:
    """Hold the lock until the file is closed."""
    try:
        if not files.hold_lock(file):
            report(
                f"{place.aside}: this file system has no locks; make sure that nothing else prepares {place.directory}"
            )
    except files.HeldElsewhereError as error:
        raise DataError(
            f"data.directory {place.directory} is being prepared already ({error}): wait for it, "
            "or set another data.directory"
        ) from None
    path = place.aside / "lock"
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise DataError(f"data.directory {place.directory} was being prepared until this moment: start again")
