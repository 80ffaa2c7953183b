"""The folders of a run on each host: whether they can be used, how much space is free, how fast they write and read."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsllm.byte_units import GIB, MIB
from dsllm.doctor.findings import Finding, Place, advice_if, below, check, error_if, where
from dsllm.files import sha256_of_file

TEST_BYTES = 64 * MIB
PART_BYTES = 4 * MIB
SLOW_WRITE = 50e6
"""Bytes per second; below this, every checkpoint stops the run for a long time."""
SLOW_READ = 20e6
LONG_SAVE_SECONDS = 300
MANIFEST = "manifest.json"

Seen = Literal["locked", "unlocked", "unseen"]
"""How a host sees a file that rank 0 has written and locked."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that a run will use."""

    role: str
    """"run" or "data"."""
    path: str
    needed_bytes: int = 0
    """Size of a checkpoint; 0: unknown."""
    num_kept: int = 1
    """Checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """A folder as one host sees it. Bytes, and bytes per second."""

    folder: Folder
    exists: bool
    tested: str
    """Folder of the test file: the folder itself, or the nearest one above it that exists."""
    free: int = 0
    write: float = 0.0
    """0: nothing could be written."""
    read: float = 0.0
    problem: str = ""
    """Why it cannot be written to; empty: it can be."""
    manifest: str = ""
    """Hash of the data's manifest; empty: it has none."""


def try_folder(folder: Folder, test_bytes: int = TEST_BYTES) -> FolderFacts:
    """Write a test file, flush it, read it back from the disk, and remove it; creates nothing else."""
    path = Path(folder.path).absolute()
    tested = next(above for above in (path, *path.parents) if above.is_dir())
    manifest = path / MANIFEST
    facts = {
        "folder": folder,
        "exists": path.is_dir(),
        "tested": str(tested),
        "free": shutil.disk_usage(tested).free,
        "manifest": sha256_of_file(manifest) if folder.role == "data" and manifest.is_file() else "",
    }
    try:
        write, read = _write_and_read(tested, test_bytes)
    except OSError as error:
        read = _read_speed_of_folder(path) if folder.role == "data" else 0.0
        return FolderFacts(**facts, problem=_in_words(error), read=read)  # type: ignore[arg-type]  # the keys above
    return FolderFacts(**facts, write=write, read=read)  # type: ignore[arg-type]


def _in_words(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the test file did not fit ({error.strerror})"
    return str(error.strerror or error)


def _write_and_read(directory: Path, num_bytes: int) -> tuple[float, float]:
    """Bytes per second to the disk and back from it."""
    part = os.urandom(min(PART_BYTES, num_bytes))  # no file system can compress random bytes
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".dsllm-doctor-", buffering=0) as file:
        start = time.perf_counter()
        written = 0
        while written < num_bytes:
            written += file.write(part) or 0
        os.fsync(file.fileno())
        write = written / (time.perf_counter() - start)
        return write, _read_speed(file.fileno(), written)


def _read_speed(descriptor: int, num_bytes: int) -> float:
    with contextlib.suppress(OSError):  # a file system in memory cannot drop its cache
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    done = 0
    while done < num_bytes and (part := os.pread(descriptor, PART_BYTES, done)):
        done += len(part)
    return done / (time.perf_counter() - start)


def _read_speed_of_folder(path: Path) -> float:
    """Read speed of the largest file in a folder that cannot be written to; 0 if it has no file."""
    files = [file for file in path.glob("**/*") if file.is_file()]
    if not files:
        return 0.0
    with max(files, key=lambda file: file.stat().st_size).open("rb") as file:
        return _read_speed(file.fileno(), min(TEST_BYTES, os.fstat(file.fileno()).st_size))


@contextlib.contextmanager
def marker(facts: FolderFacts) -> Iterator[str]:
    """Until the block ends, a locked file in the tested folder that the other hosts should see; yields its path.

    Empty if no file can be written: that is a finding of its own. Where the file system has no locks, it is not locked.
    """
    try:
        file = tempfile.NamedTemporaryFile(dir=facts.tested, prefix=".dsllm-doctor-")  # noqa: SIM115 - closed below
    except OSError:
        yield ""
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file.name


def look_at_marker(path: str) -> Seen:
    """How this host sees the file that rank 0 has written and locked."""
    try:
        with open(path, "r+", encoding="utf-8") as file:  # creates nothing where the file is not there
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "locked"
    except FileNotFoundError:
        return "unseen"
    except OSError:
        return "unlocked" if Path(path).exists() else "unseen"
    return "unlocked"


# fmt: off
# One row per check: name, where, level, problem, action.
def check_disks(
    folders: Mapping[Place, Sequence[FolderFacts]],
    unshared: Mapping[str, Sequence[Place]],
    unlocked: Mapping[str, Sequence[Place]] | None = None,
) -> Iterator[Finding]:
    """Find folders that would stop a run, for lack of permission, space or speed.

    Args:
        folders: the folders of one rank per host, in the same order everywhere.
        unshared: path of a folder -> places that do not see what rank 0 wrote there.
        unlocked: path of a folder -> places that could lock what rank 0 has locked there.
    """
    first = next(iter(folders), None)
    for path, places in (unlocked or {}).items():
        problem = "has no locks" if first in places else "does not see the locks of other hosts (Lustre with -o localflock?)"
        yield from check("disk", where(places), "advice",
            f"{path}: {problem}: a second run in this directory would not be noticed",
            "Lustre: mount it with -o flock; otherwise make sure that one job at a time uses a run directory")
    for place, own_folders in folders.items():
        for own in own_folders:
            yield from _check_use(place.host, own)
            yield from _check_space(place.host, own)
            yield from _check_speed(place.host, own, len(folders))
    for path, places in unshared.items():
        yield from check("disk", where(places), "error",
            f"{path}: does not see what rank 0 wrote there: it is another disk",
            "mount one shared file system at this path on all hosts, or name a folder on one")
    for path, places in _other_data(folders).items():
        yield from check("data", where(places), error_if(places),
            f"data folder {path}: other data than on the first host, or none",
            "copy the prepared data to every host, or put it on a shared file system")


def _check_use(host: str, own: FolderFacts) -> Iterator[Finding]:
    is_data = own.folder.role == "data"
    is_read_only = is_data and own.manifest  # prepared data is not written to
    yield from check("disk", host, error_if(own.problem and not is_read_only),
        f"{own.folder.role} folder {own.folder.path}: cannot be written to at {own.tested}: {own.problem}",
        "fix its permissions, free some space, or name another folder")
    yield from check("data", host, advice_if(is_data and not own.manifest),
        f"data folder {own.folder.path}: {'has no manifest' if own.exists else 'no such folder'}",
        "dsllm prepare RUN.yaml; otherwise rank 0 prepares it at the start, and the other ranks wait")


def _check_space(host: str, own: FolderFacts) -> Iterator[Finding]:
    if own.folder.role != "run" or own.problem:
        return
    needed, kept = own.folder.needed_bytes, own.folder.num_kept
    yield from check("disk", host, below(own.free, error=needed, advice=(kept + 1) * needed),
        f"{own.folder.path}: {own.free / GIB:.1f} GiB free; a checkpoint takes {needed / GIB:.1f} GiB, and {kept} of them are "
        "kept while the next one is written",
        "free some space, lower checkpoint.keep_last, or name a run.directory on a larger disk")
    yield from check("disk", host, advice_if(not needed and own.free < GIB),
        f"{own.folder.path}: only {own.free / GIB:.2f} GiB free",
        "free some space: a checkpoint takes 12 bytes per parameter")


def _check_speed(host: str, own: FolderFacts, num_hosts: int) -> Iterator[Finding]:
    seconds = own.folder.needed_bytes / num_hosts / own.write if own.write else 0.0
    cost = f"; a checkpoint takes {seconds / 60:.0f} minutes" if seconds > 60 else ""
    yield from check("disk", host, advice_if(0 < own.write < SLOW_WRITE or seconds > LONG_SAVE_SECONDS),
        f"{own.folder.path}: writes {own.write / 1e6:.0f} MB/s{cost}",
        "a faster disk for the run, or checkpoints further apart (checkpoint.every_steps)")
    yield from check("disk", host, advice_if(0 < own.read < SLOW_READ),
        f"{own.folder.path}: reads {own.read / 1e6:.0f} MB/s",
        "a faster disk: resuming reads a whole checkpoint, and training reads the shards")
# fmt: on


def _other_data(folders: Mapping[Place, Sequence[FolderFacts]]) -> dict[str, list[Place]]:
    """The places that do not see the same prepared data as the first host that has any, by path of the folder."""
    manifests: dict[str, dict[Place, str]] = {}
    for place, own_folders in folders.items():
        for own in own_folders:
            manifests.setdefault(own.folder.path, {})[place] = own.manifest
    first = {path: next(filter(None, seen.values()), "") for path, seen in manifests.items()}
    return {path: [place for place, own in seen.items() if own != first[path]] for path, seen in manifests.items()}
