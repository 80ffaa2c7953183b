"""The folder of a prepared tokenizer, which may come from somebody else: its files, their hash, and copies of them."""

import os
import shutil
from pathlib import Path

from dsllm import files
from dsllm.errors import DataError
from dsllm.untrusted_files import UntrustedFileError, check_regular, read_bounded

MOST_BYTES = 2**30
"""Largest tokenizer folder that is read."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer, sorted by name: those directly in its folder.

    Raises:
        DataError: the folder is missing, empty, a link or too large, or it contains a link or anything else than files.
    """
    try:
        paths = sorted(folder.iterdir())
        links = [path for path in (folder, *paths) if path.is_symlink()]
        if links:
            raise DataError(
                f"{links[0]}: is a link, and a tokenizer's own files are read only: put the files in its place"
            )
        size = sum(check_regular(path) for path in paths)
    except UntrustedFileError as error:
        raise DataError(f"{folder}: a tokenizer's folder contains files only, but something in it {error}") from error
    except OSError as error:
        raise DataError(f"{folder}: the tokenizer cannot be read: {error.strerror}") from error
    if not paths or size > MOST_BYTES:
        raise DataError(f"{folder}: {len(paths)} files of {size:,} bytes are not a tokenizer")
    return paths


def hash_of_tokenizer(folder: Path) -> str:
    """SHA-256 of a tokenizer's folder (`dsllm.files.sha256_of_folder`).

    Raises:
        DataError: see `tokenizer_files`.
    """
    tokenizer_files(folder)
    try:
        return files.sha256_of_folder(folder)
    except OSError as error:
        raise DataError(f"{folder}: the tokenizer cannot be read: {error.strerror}") from error


def check_same(folder: Path, sha256: str | None) -> None:
    """Check that a run's copy of its tokenizer is the one that it was trained with.

    Args:
        sha256: as the run's checkpoint has recorded it; None: an older dsllm recorded none, so only links are refused

    Raises:
        DataError: it is not.
    """
    found = hash_of_tokenizer(folder)
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{folder}: is not the tokenizer that the model was trained with (its SHA-256 is {found[:12]}, the checkpoint says "
            f"{sha256[:12]}): a file was damaged, changed or added. Copy it from the prepared data again, or name another with "
            "--tokenizer or --data"
        )


def copy_tokenizer(source: Path, target: Path, sha256: str) -> None:
    """Make `target` a copy of a tokenizer's files, and only of these. One that is there already is left alone.

    Raises:
        DataError: the source is not the tokenizer with this hash.
        OSError: the target cannot be written.
    """
    if _is_copy(target, sha256):
        return
    aside = files.partial(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for path in tokenizer_files(source):
            files.write_atomically(aside / path.name, read_bounded(path, MOST_BYTES))
        found = files.sha256_of_folder(aside)
        if found != sha256:
            raise DataError(
                f"{source}: has changed since it was checked (SHA-256 {found[:12]}, expected {sha256[:12]})"
            )
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        files.publish_directory(aside, target)
    except UntrustedFileError as error:
        raise DataError(f"{source}: the tokenizer cannot be read: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_copy(target: Path, sha256: str) -> bool:
    try:
        return os.path.isdir(target) and hash_of_tokenizer(target) == sha256
    except DataError:
        return False
