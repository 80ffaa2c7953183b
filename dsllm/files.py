"""Writes files so that they are either complete or absent, computes checksums, and takes locks."""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
import time
from pathlib import Path
from typing import IO

READ_BYTES = 2**20
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # NFS without a lock daemon, Lustre mounted without -o flock


def partial(path: Path) -> Path:
    """The temporary name of a file that is still being written: same folder, so that a rename can publish it."""
    return path.with_name(path.name + ".partial")


def publish(path: Path) -> None:
    """Rename a file from `partial(path)` to `path`, flushed to the disk so that it survives a power cut."""
    aside = partial(path)
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk; without this, a power cut can undo a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file in one step: a reader sees either the old content or the new.

    Raises:
        OSError: the file could not be written; the old one is unchanged and no temporary file is left.
    """
    aside = partial(path)
    try:
        if aside.is_symlink() or (aside.exists() and not aside.is_file()):
            aside.unlink()  # a link would be followed, and a pipe would wait for a reader
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; a pipe or a device in its place is refused at once.

    Raises:
        OSError: there is no such file, it is something else, or it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def write_in_place(path: Path, content: str) -> None:
    """Overwrite a small file that is there already: on a full disk its own blocks still have room, a new file has none.

    A kill at this moment can leave half of the content, so use it only where `write_atomically` has failed.

    Raises:
        OSError: there is no such regular file, or the disk refuses this too.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        left = content.encode()
        while left:
            left = left[file.write(left) :]
        file.truncate()
        os.fsync(descriptor)


def publish_directory(aside: Path, final: Path) -> None:
    """Rename a finished folder from `aside` to `final`.

    The files in it must be flushed already, and `final` must not exist or be empty.

    Raises:
        OSError: the rename or the flush failed.
    """
    sync_directory(aside)
    os.rename(aside, final)
    sync_directory(final.parent)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def sha256_of_folder(directory: Path) -> str:
    """SHA-256 over the names and contents of the files directly in a folder, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{sha256_of_file(path)}\n".encode())
    return digest.hexdigest()


class HeldElsewhereError(Exception):
    """Another process holds the lock; the message names the process."""


class LocksUnsupportedError(Exception):
    """This file system has no locks, so we cannot know whether another process is using the same files."""


def hold_lock(file: IO[str]) -> None:
    """Lock a file that was opened with "a+", until it is closed. The kernel also unlocks it when the process dies.

    Writes the holder's process, host and time into the file.

    Raises:
        HeldElsewhereError: another process holds the lock.
        LocksUnsupportedError: the file is not locked; the caller must warn the user or stop.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise HeldElsewhereError(file.read().strip() or "an unknown process") from None
    except OSError as error:
        # A lock made by creating a file would work here, but it outlives a killed process, and another host cannot
        # check whether its holder is alive: a killed job that restarts on another host would lock itself out.
        if error.errno in _NO_LOCKS:
            raise LocksUnsupportedError(f"{file.name}: {error.strerror}") from None
        raise
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.suppress(OSError):  # on a full disk the lock is held all the same, only nobody reads by whom
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), holder.encode())
