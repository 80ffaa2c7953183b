"""Turns units of text into token shards, in worker processes; what is written does not depend on how many there are."""

import functools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dsllm import files
from dsllm.data.shards import ShardWriter, bin_path, idx_path, shard_dtype
from dsllm.data.tokenizer import Tokenizer, load_tokenizer
from dsllm.errors import DataError
from dsllm.prepare.units import Unit, spooled_documents
from dsllm.processes import end_with_parent

BATCH_CHARACTERS = 1_000_000
"""Text handed to the tokenizer at once: 30 MB would cost 1 GB of memory (references: data.md, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where the shards of one preparation are written, and with which tokenizer; the same for all units."""

    shards: Path
    records: Path
    tokenizer: Path
    tokenizer_sha256: str


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """A finished shard; kept beside it as JSON, so that an interrupted preparation need not write it again."""

    source: str
    split: str
    number: int
    documents_sha256: str
    tokenizer_sha256: str
    num_documents: int
    num_tokens: int
    text_bytes: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    byte_counts: tuple[int, ...]
    """How often each of the 256 bytes occurs in the text."""
    num_not_round_trip: int
    """Held-out documents whose text decoding does not give back exactly."""

    @property
    def name(self) -> str:
        """Name of the shard, without .bin or .idx."""
        return f"{self.split}-{self.source}-{self.number:05d}"


def write_shards(units: Iterable[Unit], workplace: Workplace, num_workers: int) -> Iterator[UnitRecord]:
    """Tokenise and write units, in this process or in several; yields records as they are finished, in any order.

    Takes units only as fast as they are worked off, so that few of them wait on the disk.

    Raises:
        DataError: a shard could not be written, or a worker process died.
    """
    if num_workers == 1:
        for unit in units:
            yield write_shard(unit, workplace)
        return
    context = multiprocessing.get_context("spawn")  # threads of tokenizers and of torch do not survive a fork
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    pending: set[Future[UnitRecord]] = set()
    try:
        for unit in units:
            pending.add(pool.submit(write_shard, unit, workplace))
            if len(pending) >= 2 * num_workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise DataError(
            "a preparing process died, most likely for want of memory: lower data.num_workers and start again; "
            "finished shards are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_shard(unit: Unit, workplace: Workplace) -> UnitRecord:
    """Tokenise one unit and write its shard and record; the spooled text of training units is removed.

    Raises:
        DataError: the shard could not be written.
    """
    tokenizer = _loaded(workplace.tokenizer, workplace.tokenizer_sha256)
    counts = np.zeros(256, dtype=np.int64)
    num_not_round_trip = 0
    with ShardWriter(workplace.shards / unit.name, shard_dtype(tokenizer.vocab_size)) as writer:
        for text, ids in _encoded(unit, tokenizer):
            writer.add_document([*ids, tokenizer.end_of_text_id])
            counts += np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256)
            if unit.split == "validation":
                num_not_round_trip += tokenizer.decode(ids) != text
        info = writer.close()
    record = UnitRecord(
        source=unit.source,
        split=unit.split,
        number=unit.number,
        documents_sha256=unit.documents_sha256,
        tokenizer_sha256=workplace.tokenizer_sha256,
        text_bytes=unit.text_bytes,
        byte_counts=tuple(int(c) for c in counts),
        num_not_round_trip=num_not_round_trip,
        **asdict(info),
    )
    files.write_atomically(workplace.records / f"{unit.name}.json", json.dumps(asdict(record)))
    if unit.split == "train":
        unit.spool.unlink()
    return record


def finished_record(unit: Unit, workplace: Workplace) -> UnitRecord | None:
    """The record of a unit that an earlier, interrupted preparation finished with the same text and tokenizer."""
    try:
        raw = json.loads((workplace.records / f"{unit.name}.json").read_text())
        record = UnitRecord(**{**raw, "byte_counts": tuple(raw["byte_counts"])})
        shard = workplace.shards / unit.name
        sizes = (bin_path(shard).stat().st_size, idx_path(shard).stat().st_size)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none, or of another version: written again
    same = (record.documents_sha256, record.tokenizer_sha256) == (unit.documents_sha256, workplace.tokenizer_sha256)
    return record if same and sizes == (record.bin_bytes, record.idx_bytes) else None


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], limit: int = BATCH_CHARACTERS) -> list[list[int]]:
    """The ids of texts. A text above `limit` characters is encoded in parts, so that memory stays small."""
    parts = [list(cut(text, limit)) for text in texts]
    encoded = iter(tokenizer.encode_batch([part for text in parts for part in text]))
    return [[i for _ in text for i in next(encoded)] for text in parts]


def cut(text: str, limit: int = BATCH_CHARACTERS) -> Iterator[str]:
    """Parts of at most `limit` characters, cut where a line begins if one does.

    Best is a line end between visible characters: there GPT-2's word pattern ends a word anyway, so that the tokens are
    the same as without the cut.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        while end > start and (text[end : end + 1].isspace() or text[end - 2 : end - 1].isspace()):
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start else start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _encoded(unit: Unit, tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Texts of a unit and their ids, in order."""
    for batch in batches(spooled_documents(unit.spool)):
        yield from zip(batch, encode_documents(tokenizer, batch), strict=True)


def batches(documents: Iterable[bytes], limit: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Consecutive documents of at most `limit` characters together, or one that is longer."""
    batch: list[str] = []
    size = 0
    for content in documents:
        text = content.decode()
        if batch and size + len(text) > limit:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path, sha256: str) -> Tokenizer:
    """The tokenizer, read once per process."""
    assert sha256, "names the version of the folder"
    return load_tokenizer(folder)


def _start_worker() -> None:
    """Set up a worker process: one thread, a silent end at ctrl-C, and no life after the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when tokenizers first starts its threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()  # a killed parent cannot stop its workers
