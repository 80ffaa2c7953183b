"""Verifies a run's data: each shard once per run, by one of the ranks; all ranks agree on what was found."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsllm.byte_units import MEGABYTE
from dsllm.data.training import TrainingBatches
from dsllm.data.verify import REPAIR, BackgroundVerification, HashedShard, hashed_shards, num_without_hash
from dsllm.engine.processes.process_group import World
from dsllm.errors import DataError
from dsllm.files import write_atomically
from dsllm.run_directory import DATA_VERIFIED_FILE
from dsllm.session.agreement import on_rank_0
from dsllm.session.progress import Progress
from dsllm.untrusted_files import UntrustedFileError, read_json

FORMAT_VERSION = 1
ROUND_SECONDS = 5.0
"""How long a rank reads before it meets the others again: below every time-out, and soon enough after a signal."""
LAST_SECONDS = 20.0
"""How long the end of a run waits for shards that are not verified yet."""
MOST_SAMPLES = 200_000
"""Samples that are looked at to find the first one from a damaged shard: about two seconds."""


@dataclass
class Verification:
    """Which of the run's shards were compared with their hashes. All methods but `found_damage` are collective calls."""

    directory: Path
    """The run's."""
    batches: TrainingBatches
    shards: Sequence[HashedShard]
    data_sha256: str
    """Hash of the data's manifest."""
    world: World
    report: Callable[[str], None]
    verified: set[int] = field(default_factory=set)
    """Numbers of the shards that are as recorded; the same on all ranks."""
    damaged: dict[int, str] = field(default_factory=dict)
    """What is wrong with others."""
    between_rounds: Callable[[], None] = lambda: None
    """Called by all ranks together every few seconds before the first step; may raise on all of them."""
    _held_out: bool = field(init=False, default=False)
    """Whether the loss is not yet to be measured on the held-out text."""
    _unread: set[str] = field(init=False, default_factory=set)
    """What could not be read, reported already."""
    _thread: BackgroundVerification = field(init=False)

    def __post_init__(self) -> None:
        self._thread = self._background([])

    def before_the_first_step(self, progress: Progress) -> None:
        """Verify what has to be verified before training: all shards for `start`, those that were damaged last time.

        Writes nothing, since the directory is not held yet.

        Raises:
            DataError: on all ranks: a shard is not what was prepared.
        """
        if self.batches.data.verify == "off":
            return
        now = (
            self.remaining
            if self.batches.data.verify == "start"
            else [s for s in self.remaining if s.number in self.damaged]
        )
        if now:
            size = sum(shard.num_bytes for shard in now) / MEGABYTE
            self.report(f"verifying {len(now)} token shards ({size:,.0f} MB) before the first step")
            with self._background(now) as self._thread:
                self._wait(len(self._thread), None, self.between_rounds)
            self._agree("before the first step of this attempt", progress, record=False)

    @contextmanager
    def running(self) -> Iterator["Verification"]:
        """Verify the remaining shards behind the block, held-out text first. Every rank takes a share of them."""
        shards = (
            [] if self.batches.data.verify == "off" else sorted(self.remaining, key=lambda shard: not shard.held_out)
        )
        self._held_out = any(shard.held_out for shard in shards)
        if self.batches.data.verify == "start":
            self._save()
        with self._background(shards) as self._thread:
            yield self

    @property
    def remaining(self) -> list[HashedShard]:
        """The shards that no rank has verified yet."""
        return [shard for shard in self.shards if shard.number not in self.verified]

    @property
    def found_damage(self) -> bool:
        """Whether this rank has found a shard that is not what was prepared."""
        return bool(self._thread.problems)

    def refuse(self, progress: Progress) -> None:
        """End the run after a rank has found damage.

        Raises:
            DataError: on all ranks; says since when the run has used the shard, and what to do.
        """
        self._agree(f"after step {progress.step}", progress)

    def check_held_out(self, progress: Progress) -> None:
        """Wait until the held-out shards are verified, before the loss is measured on them.

        Raises:
            DataError: on all ranks: one of them is not what was prepared.
        """
        if self._held_out:
            self._wait(sum(shard.held_out for shard in self._thread.shards), None)
            self._held_out = False
            self._agree(f"before step {progress.step} is evaluated", progress)

    def before_save(self, progress: Progress, last: bool) -> None:
        """Keep what was verified in the run's directory; at the end of the run, first verify what is left.

        Raises:
            DataError: on all ranks: a shard is not what was prepared.
        """
        if last and self.batches.data.verify != "off":
            self._wait(len(self._thread), LAST_SECONDS)
            self._agree(f"after step {progress.step}", progress)
            size = sum(shard.num_bytes for shard in self.remaining) / MEGABYTE
            if self.remaining:
                self.report(
                    f"{len(self.remaining)} of {len(self.shards)} token shards ({size:,.0f} MB) were not verified in this "
                    "run: `dsllm prepare CONFIG` verifies all of them"
                )
        self._save()

    def _save(self) -> None:
        self._gather()
        if self.world.rank != 0 or self.batches.data.verify == "off":
            return
        content = {
            "format_version": FORMAT_VERSION,
            "data_sha256": self.data_sha256,
            "shards": len(self.shards),
            "verified": _ranges(self.verified),
            "damaged": [[number, problem] for number, problem in sorted(self.damaged.items())],
        }
        try:
            write_atomically(self.directory / DATA_VERIFIED_FILE, json.dumps(content) + "\n")
        except OSError as error:  # then a later attempt verifies them again
            self.report(f"{self.directory / DATA_VERIFIED_FILE} was not written: {error.strerror or error}")

    def _background(self, shards: Sequence[HashedShard]) -> BackgroundVerification:
        rate = self.batches.data.verify_megabytes_per_second * MEGABYTE / self.world.size
        folder = self.batches.directory
        return BackgroundVerification(folder, shards[self.world.rank :: self.world.size], rate)

    def _wait(self, num_shards: int, seconds: float | None, between_rounds: Callable[[], None] = lambda: None) -> None:
        """Wait for the first shards of every rank's share, in rounds, so that no rank waits for another beyond its time-out."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = ROUND_SECONDS if deadline is None else min(ROUND_SECONDS, deadline - time.monotonic())
            self._thread.wait(num_shards, left)
            over = self.found_damage or self._thread.has_done(num_shards)
            over = over or (deadline is not None and time.monotonic() >= deadline)
            missing, damaged = self.world.sum([not over, self.found_damage])
            if not missing or damaged:
                return
            between_rounds()

    def _gather(self) -> None:
        own = (list(self._thread.verified), dict(self._thread.problems), dict(self._thread.unread))
        for verified, problems, unread in self.world.gather(own):
            self.verified |= set(verified)
            for number in verified:
                self.damaged.pop(number, None)
            self.damaged |= problems
            for problem in set(unread.values()) - self._unread:
                self.report(f"not verified: {problem}")
            self._unread |= set(unread.values())

    def _agree(self, when: str, progress: Progress, record: bool = True) -> None:
        """Raise on all ranks if any has found damage."""
        self._gather()
        if not self.damaged:
            return
        problems = [self.damaged[number] for number in sorted(self.damaged)]
        first = on_rank_0(self.world, lambda: self._first_step(progress))
        if record:
            self._save()
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise DataError("\n".join([*problems[:8], *more, f"Found {when}. {_advice(first)}To repair, {REPAIR}"]))

    def _first_step(self, progress: Progress) -> int | None:
        """The first step with a sample from a damaged shard; 0: none up to now. None: too far back to tell."""
        prefixes = {shard.prefix for shard in self.shards if shard.number in self.damaged and not shard.held_out}
        sample = self.batches.first_sample_in(prefixes, progress.position, MOST_SAMPLES) if prefixes else -1
        return None if sample is None else sample // self.batches.global_batch_sequences + 1


def open_verification(
    directory: Path,
    batches: TrainingBatches,
    progress: Progress,
    world: World,
    report: Callable[[str], None],
    between_rounds: Callable[[], None] = lambda: None,
) -> Verification:
    """What earlier attempts of a run have verified, after what has to be verified before the first step. Writes nothing.

    A collective call.

    Args:
        directory: the run's
        progress: how far the run is
        between_rounds: called by all ranks together every few seconds while shards are verified; may raise on all of them

    Raises:
        DataError: on all ranks: a shard is not what was prepared.
    """
    manifest, sha256 = batches.manifest, progress.data_sha256
    shards, without = hashed_shards(manifest), num_without_hash(manifest)
    verified, damaged = on_rank_0(world, lambda: _read_record(directory, sha256, len(shards)))
    if without and batches.data.verify != "off":
        report(
            f"{without} token shards have no recorded checksum (they were not prepared here): their content is not verified"
        )
    verification = Verification(
        directory=directory, batches=batches, shards=shards, data_sha256=sha256, world=world, report=report,
        verified=verified, damaged=damaged, between_rounds=between_rounds,
    )  # fmt: skip
    verification.before_the_first_step(progress)
    return verification


def _advice(first: int | None) -> str:
    """Which checkpoints to distrust, after a step is known that was the first to train on a damaged shard."""
    if first == 0:
        return "No step has trained on it, so every checkpoint is sound. "
    if first is None:
        return (
            "If it was damaged before the run read it, the checkpoints of this run have learned from damaged tokens: keep "
            "them only if you know that it was not. "
        )
    return (
        f"The run has trained on it since step {first}: if it was damaged already then, checkpoints after step {first - 1} "
        "have learned from damaged tokens; move them away, and the same command continues from the newest that is left. "
    )


def _ranges(numbers: set[int]) -> list[list[int]]:
    """Numbers as sorted [first, stop) ranges, which are few."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1][1] = number + 1
        else:
            found.append([number, number + 1])
    return found


def _read_record(directory: Path, data_sha256: str, num_shards: int) -> tuple[set[int], dict[int, str]]:
    """What data_verified.json says; a file that is not readable, or about other data, says nothing."""
    try:
        raw: Any = read_json(directory / DATA_VERIFIED_FILE)
        if (raw["format_version"], raw["data_sha256"], raw["shards"]) != (FORMAT_VERSION, data_sha256, num_shards):
            return set(), {}
        ranges = [(int(first), min(int(stop), num_shards)) for first, stop in raw["verified"]]
        damaged = {int(number): str(problem) for number, problem in raw["damaged"]}
        return {number for first, stop in ranges for number in range(max(first, 0), stop)} - damaged.keys(), damaged
    except (OSError, UntrustedFileError, KeyError, TypeError, ValueError):
        return set(), {}
