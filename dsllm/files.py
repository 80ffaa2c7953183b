"""Files that are either there whole or not there at all: written aside, flushed to the disk, renamed."""

import errno
import fcntl
import hashlib
import os
import socket
import time
from pathlib import Path
from typing import IO

READ_BYTES = 2**20
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems


def partial(path: Path) -> Path:
    """Where a file is written before it is published: beside its place, on the same file system."""
    return path.with_name(path.name + ".partial")


def publish(path: Path) -> None:
    """Give a file that was written to `partial(path)` its name; it survives a power cut from here on."""
    aside = partial(path)
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk: without it a rename may be lost in a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file: a reader sees the old content or the new, never a part of it.

    Raises:
        OSError: the file could not be written; the old one is untouched and nothing is left aside.
    """
    aside = partial(path)
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def publish_directory(aside: Path, final: Path) -> None:
    """Rename a finished folder into place. Its files must be flushed already; `final` must not exist.

    Raises:
        OSError: the disk refuses.
    """
    sync_directory(aside)
    os.rename(aside, final)
    sync_directory(final.parent)


def sha256_of_file(path: Path) -> str:
    """Checksum of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def sha256_of_folder(directory: Path) -> str:
    """Checksum of the files directly in a folder: their names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{sha256_of_file(path)}\n".encode())
    return digest.hexdigest()


class HeldElsewhereError(Exception):
    """Another process holds the lock; the message says which."""


def hold_lock(file: IO[str]) -> bool:
    """Lock a file, opened with "a+", until it is closed; the kernel lets go when the process ends, however it ends.

    The holder writes its name into the file. Returns False where the file system has no locks.

    Raises:
        HeldElsewhereError: with the name of the holder.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise HeldElsewhereError(file.read().strip() or "an unknown process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return False
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return True
