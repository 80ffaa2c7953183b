"""The folders of a run on each host: whether they can be used, their space, and how fast they write and read."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsllm.byte_units import GIB, MIB
from dsllm.doctor.findings import Finding, Place, where
from dsllm.files import sha256_of_file

TEST_BYTES = 64 * MIB
PART_BYTES = 4 * MIB
SLOW_WRITE = 50e6
"""Bytes a second under which a checkpoint stops the run for long."""
SLOW_READ = 20e6
LONG_SAVE_SECONDS = 300
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that a run will use."""

    role: str
    """"run" or "data"."""
    path: str
    needed_bytes: int = 0
    """What one checkpoint takes; 0: not known."""
    num_kept: int = 1
    """Checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """What a host sees of it. Bytes, and bytes a second."""

    folder: Folder
    exists: bool
    tested: str
    """Where the test file was written: the folder, or the nearest one above it that exists."""
    free: int = 0
    write: float = 0.0
    """0: nothing was written."""
    read: float = 0.0
    problem: str = ""
    """Why it cannot be written to."""
    manifest: str = ""
    """Hash of the data's manifest; empty: none there."""


def try_folder(folder: Folder, test_bytes: int = TEST_BYTES) -> FolderFacts:
    """Write a test file, flush it, read it back from the disk, and remove it; nothing is created besides."""
    path = Path(folder.path).absolute()
    tested = next(above for above in (path, *path.parents) if above.is_dir())
    manifest = path / MANIFEST
    seen = {
        "folder": folder,
        "exists": path.is_dir(),
        "tested": str(tested),
        "free": shutil.disk_usage(tested).free,
        "manifest": sha256_of_file(manifest) if folder.role == "data" and manifest.is_file() else "",
    }
    try:
        write, read = _write_and_read(tested, test_bytes)
    except OSError as error:
        kept = _speed_of_what_is_there(path) if folder.role == "data" else 0.0
        return FolderFacts(**seen, problem=_in_words(error), read=kept)  # type: ignore[arg-type]  # the keys above
    return FolderFacts(**seen, write=write, read=read)  # type: ignore[arg-type]


def _in_words(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the test file did not fit ({error.strerror})"
    return str(error.strerror or error)


def _write_and_read(directory: Path, num_bytes: int) -> tuple[float, float]:
    """Bytes a second, flushed to the disk and back from it; random bytes, which no file system compresses."""
    part = os.urandom(min(PART_BYTES, num_bytes))
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".dsllm-doctor-", buffering=0) as file:
        start = time.perf_counter()
        written = 0
        while written < num_bytes:
            written += file.write(part) or 0
        os.fsync(file.fileno())
        write = written / (time.perf_counter() - start)
        return write, _read_speed(file.fileno(), written)


def _read_speed(descriptor: int, num_bytes: int) -> float:
    with contextlib.suppress(OSError):  # a file system in memory has nothing to let go of
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    done = 0
    while done < num_bytes and (part := os.pread(descriptor, PART_BYTES, done)):
        done += len(part)
    return done / (time.perf_counter() - start)


def _speed_of_what_is_there(path: Path) -> float:
    """Read speed of the largest file of a folder that cannot be written to; 0 where it has none."""
    files = [file for file in path.glob("**/*") if file.is_file()]
    if not files:
        return 0.0
    with max(files, key=lambda file: file.stat().st_size).open("rb") as file:
        return _read_speed(file.fileno(), min(TEST_BYTES, os.fstat(file.fileno()).st_size))


@contextlib.contextmanager
def marker(seen: FolderFacts) -> Iterator[str]:
    """A file in the tested folder, for the duration of the block, that the other hosts are to see; its path.

    Empty where none can be written: then the folder has a problem of its own.
    """
    try:
        file = tempfile.NamedTemporaryFile(dir=seen.tested, prefix=".dsllm-doctor-")  # noqa: SIM115 - closed below
    except OSError:
        yield ""
        return
    with file:
        yield file.name


def check_disks(seen: Mapping[Place, Sequence[FolderFacts]], blind: Mapping[str, Sequence[Place]]) -> Iterator[Finding]:
    """What will stop a run for want of a folder, space or speed.

    Args:
        seen: the folders of one rank of each host, in the same order everywhere.
        blind: path of a folder -> places that do not see what rank 0 wrote there.
    """
    for place, folders in seen.items():
        for own in folders:
            yield from _judge_use(place, own)
            yield from _judge_space(place, own)
            yield from _judge_speed(place, own, len(seen))
    for path, places in blind.items():
        yield Finding(
            level="error",
            check="disk",
            where=where(places),
            problem=f"{path}: does not see what rank 0 wrote there: it is another disk",
            action="mount one shared file system at this path on all hosts, or name a folder on one",
        )
    yield from _judge_same_data(seen)


def _judge_use(place: Place, own: FolderFacts) -> Iterator[Finding]:
    read_only_data = own.folder.role == "data" and own.manifest
    if own.problem and not read_only_data:
        yield Finding(
            level="error",
            check="disk",
            where=place.host,
            problem=f"{own.folder.role} folder {own.folder.path}: cannot be written to at {own.tested}: {own.problem}",
            action="mend its permissions or free space, or name another folder",
        )
    if own.folder.role == "data" and not own.manifest:
        yield Finding(
            level="advice",
            check="data",
            where=place.host,
            problem=f"data folder {own.folder.path}: {'has no manifest' if own.exists else 'no such folder'}",
            action="dsllm prepare RUN.yaml; otherwise rank 0 prepares it at the start, and the other ranks wait",
        )


def _judge_space(place: Place, own: FolderFacts) -> Iterator[Finding]:
    need = own.folder.needed_bytes
    if own.folder.role != "run" or own.problem:
        return
    if need and own.free < (own.folder.num_kept + 1) * need:
        kept = f"{own.folder.num_kept} of them are kept while the next is written"
        yield Finding(
            level="error" if own.free < need else "advice",
            check="disk",
            where=place.host,
            problem=f"{own.folder.path}: {own.free / GIB:.1f} GiB free; a checkpoint takes {need / GIB:.1f} GiB, and {kept}",
            action="free some space, lower checkpoint.keep_last, or name a run.directory on a larger disk",
        )
    elif not need and own.free < GIB:
        yield Finding(
            level="advice",
            check="disk",
            where=place.host,
            problem=f"{own.folder.path}: only {own.free / GIB:.2f} GiB free",
            action="free some space: a checkpoint takes 12 bytes per parameter",
        )


def _judge_speed(place: Place, own: FolderFacts, num_hosts: int) -> Iterator[Finding]:
    seconds = own.folder.needed_bytes / num_hosts / own.write if own.write else 0.0
    if 0 < own.write < SLOW_WRITE or seconds > LONG_SAVE_SECONDS:
        cost = f"; a checkpoint takes {seconds / 60:.0f} minutes" if seconds > 60 else ""
        yield Finding(
            level="advice",
            check="disk",
            where=place.host,
            problem=f"{own.folder.path}: writes {own.write / 1e6:.0f} MB/s{cost}",
            action="a faster disk for the run, or checkpoints further apart (checkpoint.every_steps)",
        )
    if 0 < own.read < SLOW_READ:
        yield Finding(
            level="advice",
            check="disk",
            where=place.host,
            problem=f"{own.folder.path}: reads {own.read / 1e6:.0f} MB/s",
            action="a faster disk: resuming reads a whole checkpoint, and training reads the shards",
        )


def _judge_same_data(seen: Mapping[Place, Sequence[FolderFacts]]) -> Iterator[Finding]:
    """Every host must see the same prepared data, on a shared disk or as a copy."""
    known: dict[str, str] = {}
    for folders in seen.values():
        known |= {own.folder.path: own.manifest for own in folders if own.manifest and own.folder.path not in known}
    for path, manifest in known.items():
        others = [
            p for p, folders in seen.items() for own in folders if own.folder.path == path and own.manifest != manifest
        ]
        if others:
            yield Finding(
                level="error",
                check="data",
                where=where(others),
                problem=f"data folder {path}: other data than on the first host, or none",
                action="copy the prepared data to every host, or put it on a shared file system",
            )
