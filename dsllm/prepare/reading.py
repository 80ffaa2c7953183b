"""Reads all sources once: drops duplicates, holds documents out, samples for the tokenizer, cuts units, and counts."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsllm.byte_units import MEGABYTE
from dsllm.config.data import DataConfig, SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.document import BadInput, Document, Item, Remark, shown
from dsllm.prepare.embedded import embedded_documents
from dsllm.prepare.find_files import find_files
from dsllm.prepare.source_datasets import dataset_documents
from dsllm.prepare.source_files import EMPTY, read_documents, size_of
from dsllm.prepare.text_lines import Position
from dsllm.prepare.units import Unit, UnitCutter

SPLITS = ("train", "validation")
HASH_RANGE = 2**64
_NUM_EXAMPLES = 5  # bad inputs listed per reason, and files per remark

Progress = Callable[[str, float, float | None], None]
"""Called with (activity, megabytes done, total megabytes or None if unknown)."""


@dataclass
class SourceCount:
    """Counts what was read from one source: read = kept + duplicates + empty + bad."""

    read: int = 0
    """Documents and bad inputs."""
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Documents by split."""
    kept_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """UTF-8 bytes by split."""
    duplicates: int = 0
    """Documents whose text was read before, from any source."""
    empty: int = 0
    """Documents with only white space."""
    bad: Counter[str] = field(default_factory=Counter)
    """Bad inputs by reason."""
    bad_examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of them by reason."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Files with something to know about them, by what it is."""
    remark_examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of them."""
    num_files: int = 0
    """Files that were read."""
    ignored_files: Counter[str] = field(default_factory=Counter)
    """Files in the source's folders that are passed over, by suffix or reason."""
    cut_at_megabytes: float | None = None
    """max_megabytes, if reading stopped there."""

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes kept, over both splits."""
        return sum(self.kept_bytes.values())


class TrainingSample:
    """Collects the documents with the smallest hashes: an even sample in one pass, whatever the order of the documents."""

    def __init__(self, budget_bytes: int):
        self._budget = budget_bytes
        self._heap: list[tuple[int, bytes]] = []  # largest hash first
        self.num_bytes = 0

    def offer(self, hash_value: int, content: bytes) -> None:
        """Add a document, then drop those with the largest hashes as long as the rest fill the budget."""
        if self.num_bytes >= self._budget and -self._heap[0][0] < hash_value:
            return
        heapq.heappush(self._heap, (-hash_value, content))
        self.num_bytes += len(content)
        while self.num_bytes - len(self._heap[0][1]) >= self._budget:
            self.num_bytes -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> Iterator[str]:
        """The texts of the sample, sorted by hash."""
        for _, content in sorted(self._heap, reverse=True):
            yield content.decode()

    def sha256(self) -> str:
        """Identifies the sample, so that a tokenizer trained from it is recognised."""
        digest = hashlib.sha256()
        for _, content in sorted(self._heap, reverse=True):
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


class Reading:
    """One pass over all sources: iterate over `units` to the end, then read `counts` and `sample`."""

    def __init__(self, config: DataConfig, spool: Path, progress: Progress, sample_bytes: int = 0):
        """Prepare to read.

        Args:
            spool: folder for the units.
            sample_bytes: training text to collect in `sample`; 0 (default): none.
        """
        self._config = config
        self._spool = spool
        self._progress = progress
        self._sample_bytes = sample_bytes
        self.sample = TrainingSample(sample_bytes)
        self._seen: set[bytes] = set()
        self._held_out_below = round(config.validation_share * HASH_RANGE)
        self._smallest = HASH_RANGE
        self.counts = {source.name: SourceCount() for source in config.sources if source.kind != "megatron"}
        self.megabytes_read = 0.0

    def units(self) -> Iterator[Unit]:
        """Read the sources and yield each unit when it is complete, the units of a source and split in order.

        Raises:
            DataError: a source is missing or yields no document, or an input is bad and on_bad_input is error.
        """
        for source in self._config.sources:
            if source.kind == "megatron":
                continue
            cutters = {
                split: UnitCutter(self._spool, source.name, split, round(self._config.shard_megabytes * MEGABYTE))
                for split in SPLITS
            }
            try:
                yield from self._units_of(source, cutters)
            finally:
                for cutter in cutters.values():
                    cutter.close()
            self._check_not_empty(source)

    def total(self, split: str) -> int:
        """Number of documents in a split, over all sources."""
        return sum(count.kept[split] for count in self.counts.values())

    def hold_out_one(self) -> "Reading":
        """A new reading of the same sources that holds out one document, the one with the smallest hash."""
        again = Reading(self._config, self._spool, self._progress, self._sample_bytes)
        again._held_out_below = self._smallest + 1
        return again

    def _units_of(self, source: SourceConfig, cutters: dict[str, UnitCutter]) -> Iterator[Unit]:
        count = self.counts[source.name]
        for item in self._items(source, count):
            if isinstance(item, Remark):
                _count(item.kind, item.place, count.remarks, count.remark_examples)
                continue
            count.read += 1
            content = self._accept(item, source, count)
            if content is None:
                continue
            if source.max_megabytes is not None and count.total_bytes + len(content) > source.max_megabytes * MEGABYTE:
                count.read -= 1  # this document is not used, so it does not count as read
                count.cut_at_megabytes = source.max_megabytes
                break
            unit = self._keep(content, count, cutters)
            if unit is not None:
                yield unit
        yield from (unit for cutter in cutters.values() if (unit := cutter.finish()) is not None)

    def _accept(self, item: Document | BadInput, source: SourceConfig, count: SourceCount) -> bytes | None:
        """A usable document in UTF-8; None for one that is counted as empty or bad."""
        if isinstance(item, Document):
            try:
                content = item.text.encode()
            except UnicodeEncodeError as error:  # JSON can contain half a character: "\ud83d"
                item = BadInput(item.origin, "not Unicode text", f"a lone surrogate at character {error.start}")
            else:
                if content.strip():
                    return content
                count.empty += 1
                return None
        if source.on_bad_input == "error":
            raise DataError(
                f"source '{source.name}': {item}. Fix or remove it, or set on_bad_input: skip for this source: "
                "then such inputs are skipped, counted and reported"
            )
        _count(shown(item.reason), str(item), count.bad, count.bad_examples)
        return None

    def _keep(self, content: bytes, count: SourceCount, cutters: dict[str, UnitCutter]) -> Unit | None:
        """Add a document to its split and to the sample; returns a unit if this completes one."""
        # Each decision reads another part of the hash, so that they are independent of each other.
        digest = hashlib.sha256(content).digest()
        if self._config.deduplicate:
            if digest[:16] in self._seen:
                count.duplicates += 1
                return None
            self._seen.add(digest[:16])
        place = int.from_bytes(digest[16:24], "little")
        self._smallest = min(self._smallest, place)
        split = "validation" if place < self._held_out_below else "train"
        count.kept[split] += 1
        count.kept_bytes[split] += len(content)
        self.megabytes_read += len(content) / MEGABYTE
        if split == "train" and self._sample_bytes:
            self.sample.offer(int.from_bytes(digest[24:], "little"), content)
        return cutters[split].add(content, digest)

    def _items(self, source: SourceConfig, count: SourceCount) -> Iterator[Item]:
        """Read a source, and report the progress."""
        if source.kind == "files":
            yield from self._items_of_files(source, count)
            return
        items = embedded_documents(source.paths) if source.kind == "embedded" else dataset_documents(source)
        for item in items:
            yield item
            self._progress(f"reading {source.name}", self.megabytes_read, None)

    def _items_of_files(self, source: SourceConfig, count: SourceCount) -> Iterator[Item]:
        paths, count.ignored_files = find_files(source)
        sizes = [size_of(path) for path in paths]
        total = sum(sizes)
        done_bytes = 0
        for path, size in zip(paths, sizes, strict=True):
            count.num_files += 1
            position = Position()
            for item in read_documents(path, source, position):
                yield item
                self._progress(
                    f"reading {source.name}", (done_bytes + position.file_bytes) / MEGABYTE, total / MEGABYTE
                )
            done_bytes += size
            self._progress(f"reading {source.name}", done_bytes / MEGABYTE, total / MEGABYTE)

    def _check_not_empty(self, source: SourceConfig) -> None:
        count = self.counts[source.name]
        if sum(count.kept.values()) == 0:
            reasons = [f"{count.duplicates} duplicates", f"{count.empty} empty", f"{count.bad.total()} bad"]
            empty_files = (
                f"; {count.remarks[EMPTY]} of its {count.num_files} files are empty" if count.remarks[EMPTY] else ""
            )
            limit = (
                f"; its first document is larger than max_megabytes {count.cut_at_megabytes}"
                if count.cut_at_megabytes
                else ""
            )
            raise DataError(
                f"source '{source.name}' yields no document: {count.read} read, of which {', '.join(reasons)}"
                f"{empty_files}{limit}"
            )


def _count(what: str, example: str, counter: Counter[str], examples: dict[str, list[str]]) -> None:
    """Count one case, and keep the first few as examples."""
    counter[what] += 1
    if counter[what] <= _NUM_EXAMPLES:
        examples.setdefault(what, []).append(example)
