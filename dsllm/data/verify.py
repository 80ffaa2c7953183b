"""Compares token shards with the SHA-256 that was recorded when they were written: at once, or slowly behind training."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsllm.data.manifest import Manifest
from dsllm.data.shards import bin_path
from dsllm.errors import DataError
from dsllm.untrusted_files import UntrustedFileError, check_regular

_PART_BYTES = 2**23
"""Read at once. Between two parts the thread needs the interpreter's lock, so they are large."""
_NICE = 10
"""Of the thread on Linux. Lower still, it would keep that lock for longer where the cores are busy."""
REPAIR = (
    "put back a copy of the file, or write it again by `dsllm prepare CONFIG --force`: unchanged sources give the same "
    "shards, and a run on them continues"
)


@dataclass(frozen=True, kw_only=True)
class HashedShard:
    """A shard whose hash is recorded."""

    number: int
    """Its place among those of the manifest."""
    prefix: str
    num_bytes: int
    """Size of the .bin."""
    sha256: str
    held_out: bool
    """Whether it is part of a validation split."""


def hashed_shards(manifest: Manifest) -> list[HashedShard]:
    """The shards with a recorded hash, each once, in the order of the manifest. Shards that were adopted have none."""
    held_out = {record.prefix for source in manifest.sources for record in source.validation}
    found = {record.prefix: record for record in manifest.records()}
    return [
        HashedShard(
            number=number,
            prefix=prefix,
            num_bytes=record.bin_bytes,
            sha256=record.bin_sha256,
            held_out=prefix in held_out,
        )
        for number, (prefix, record) in enumerate(found.items())
        if record.bin_sha256 is not None
    ]


def num_without_hash(manifest: Manifest) -> int:
    """How many shards have no recorded hash, so that their content cannot be verified."""
    return len({record.prefix for record in manifest.records() if record.bin_sha256 is None})


def check_content(
    directory: Path, shards: Iterable[HashedShard], progress: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Read shards and compare them with their hashes.

    Args:
        progress: called often with the bytes read since the last call

    Raises:
        DataError: with one line for each that differs or cannot be read.
    """
    problems = []
    for shard in shards:
        try:
            problem = difference(directory, shard, progress)
        except OSError as error:
            problem = f"{bin_path(directory / shard.prefix)}: cannot be read: {error.strerror or error}"
        if problem:
            problems.append(problem)
    if problems:
        raise DataError("\n".join(problems))


def check_held_out(directory: Path, manifest: Manifest, report: Callable[[str], None]) -> None:
    """Compare the held-out shards with their hashes, before a loss is measured on them.

    Args:
        report: called with a warning where there is no hash

    Raises:
        DataError: one differs or cannot be read.
    """
    try:
        check_content(directory, [shard for shard in hashed_shards(manifest) if shard.held_out])
    except DataError as error:
        raise DataError(f"{error}\nTo repair this, {REPAIR}") from error
    records = [record for source in manifest.sources for record in source.validation]
    if any(record.bin_sha256 is None for record in records):
        report(f"{directory}: held-out text without a recorded checksum is not verified")


def difference(directory: Path, shard: HashedShard, pace: Callable[[int], None]) -> str:
    """How a shard differs from what was recorded; empty: it is the same.

    Args:
        pace: called after each part with its size in bytes; may wait, or raise to stop

    Raises:
        OSError: it cannot be read.
    """
    path, digest = bin_path(directory / shard.prefix), hashlib.sha256()
    try:
        check_regular(path)
    except UntrustedFileError as error:
        return f"{path}: {error}"
    with path.open("rb", buffering=0) as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)  # without the interpreter's lock, so that training continues
            pace(len(part))
    if digest.hexdigest() == shard.sha256:
        return ""
    return (
        f"{path}: its content is not what was prepared (SHA-256 {digest.hexdigest()[:12]}, the manifest says "
        f"{shard.sha256[:12]}): the file was damaged or changed"
    )


class _Stopped(Exception):
    """Raised inside the thread when the block is left."""


class BackgroundVerification:
    """Verifies shards in a thread, one after the other, at a bounded rate and with the lowest priority.

    with BackgroundVerification(directory, shards, bytes_per_second) as thread:
        ...  # thread.problems grows
    """

    def __init__(self, directory: Path, shards: Sequence[HashedShard], bytes_per_second: float):
        self._directory, self.shards, self._rate = directory, shards, bytes_per_second
        self.verified: list[int] = []
        """Numbers of the shards that are as recorded."""
        self.problems: dict[int, str] = {}
        """What is wrong with the others, by their number."""
        self.unread: dict[int, str] = {}
        """Shards that could not be read, which need not be damage."""
        self._hurry = self._stop = False
        self._changed = threading.Event()
        self._next_read = 0.0
        self._thread = threading.Thread(target=self._run, name="verify-data", daemon=True)

    def __len__(self) -> int:
        """Shards to verify."""
        return len(self.shards)

    @property
    def num_done(self) -> int:
        """Shards that were looked at."""
        return len(self.verified) + len(self.problems) + len(self.unread)

    def has_done(self, num_shards: int) -> bool:
        """Whether the first `num_shards` are done."""
        return self.num_done >= num_shards or not self._thread.is_alive()

    def wait(self, num_shards: int, seconds: float) -> None:
        """Wait until the first `num_shards` are done, without the limit of the rate."""
        deadline = time.monotonic() + seconds
        self._hurry = True
        self._changed.set()
        while not self.has_done(num_shards) and time.monotonic() < deadline:
            self._thread.join(0.01)
        self._hurry = False
        self._changed.clear()

    def __enter__(self) -> "BackgroundVerification":
        if self.shards:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._changed.set()
        if self.shards:
            self._thread.join(10)  # longer only where a file system hangs; the thread ends with the process

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # on Linux, of this thread alone
        self._next_read = time.monotonic()
        for shard in self.shards:
            try:
                problem = difference(self._directory, shard, self._pace)
            except _Stopped:
                return
            except OSError as error:
                self.unread[shard.number] = f"{shard.prefix}: cannot be read: {error.strerror or error}"
                continue
            if problem:
                self.problems[shard.number] = problem
            else:
                self.verified.append(shard.number)

    def _pace(self, num_bytes: int) -> None:
        """Wait so long that the rate is not exceeded."""
        self._next_read = max(self._next_read, time.monotonic() - 1) + num_bytes / self._rate
        while not self._stop and not self._hurry and (delay := self._next_read - time.monotonic()) > 0:
            self._changed.wait(delay)
        if self._hurry:
            self._next_read = time.monotonic()
        if self._stop:
            raise _Stopped
