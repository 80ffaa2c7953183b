"""Tokenises units of text into token shards, in worker processes; their number does not change the result."""

import functools
import hashlib
import json
import multiprocessing
import multiprocessing.process
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dsllm import files
from dsllm.data.shards import Shard, ShardWriter, bin_path, idx_path, shard_dtype
from dsllm.data.tokenizer import Tokenizer
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import DataError
from dsllm.prepare.units import Unit, changed, spooled_documents, unit_name
from dsllm.processes import end_with_parent
from dsllm.untrusted_files import parse_json, read_bounded

BATCH_CHARACTERS = 1_000_000
"""Text handed to the tokenizer at once; with 30 MB it would need 1 GB of memory."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to write the shards of a preparation, and the tokenizer to use."""

    shards: Path
    """Folder of the shards."""
    records: Path
    """Folder of the `UnitRecord`s, in JSON."""
    tokenizer: Path
    """Folder of the tokenizer."""
    tokenizer_sha256: str
    """`files.sha256_of_folder` of it."""


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """A finished shard, saved as JSON, so that a preparation that was interrupted can use the shard again."""

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
    """Held-out documents whose text changes when it is encoded and decoded."""

    @property
    def name(self) -> str:
        """Name of the shard, without .bin or .idx."""
        return unit_name(self.source, self.split, self.number)


def write_shards(units: Iterable[Unit], destination: Destination, num_workers: int) -> Iterator[UnitRecord]:
    """Tokenise units and write their shards, in this process or in several; yields the records in any order.

    Takes the next unit only when a worker needs it soon, so that few spool files are on the disk at a time.

    Raises:
        DataError: a shard could not be written, or a worker process died.
    """
    if num_workers == 1:
        for unit in units:
            yield write_shard(unit, destination)
        return
    context = multiprocessing.get_context("spawn")  # a fork would lose the threads of tokenizers and torch
    other_processes = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    pending: set[Future[UnitRecord]] = set()
    try:
        for unit in units:
            pending.add(_submit(pool, unit, destination))
            if len(pending) >= 2 * num_workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        # Python 3.11 waits forever for a worker that was being started when another one died.
        _kill_workers(other_processes)
        raise DataError(
            "a worker process died, probably because memory ran out: lower data.num_workers and start again; "
            "finished shards are kept"
        ) from error
    except DataError:  # the other workers finish their units
        raise
    except BaseException:  # a signal: do not wait for the workers, a job that is ended has few seconds
        _kill_workers(other_processes)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _kill_workers(other_processes: set[multiprocessing.process.BaseProcess]) -> None:
    for worker in set(multiprocessing.active_children()) - other_processes:
        worker.kill()


def _submit(pool: ProcessPoolExecutor, unit: Unit, destination: Destination) -> Future[UnitRecord]:
    try:
        return pool.submit(write_shard, unit, destination)
    except OSError as error:  # a worker died while Python 3.11 was starting another one: it closes their pipes
        raise BrokenProcessPool(str(error)) from error


def write_shard(unit: Unit, destination: Destination) -> UnitRecord:
    """Tokenise one unit and write its shard and record; removes the spool file of a training unit.

    Raises:
        DataError: the shard could not be written.
    """
    tokenizer = _loaded(destination.tokenizer, destination.tokenizer_sha256)
    counts = np.zeros(256, dtype=np.int64)
    num_not_round_trip = 0
    with ShardWriter(destination.shards / unit.name, shard_dtype(tokenizer.vocab_size)) as writer:
        documents = hashlib.sha256()
        for text, ids in _encoded(unit, tokenizer, documents.update):
            writer.add_document(tokenizer.document(ids))
            counts += np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256)
            if unit.split == "validation":
                num_not_round_trip += tokenizer.decode(ids) != text
        if documents.hexdigest() != unit.documents_sha256:
            raise changed(unit.spool)
        info = writer.close()
    record = UnitRecord(
        source=unit.source,
        split=unit.split,
        number=unit.number,
        documents_sha256=unit.documents_sha256,
        tokenizer_sha256=destination.tokenizer_sha256,
        text_bytes=unit.text_bytes,
        byte_counts=tuple(int(c) for c in counts),
        num_not_round_trip=num_not_round_trip,
        **asdict(info),
    )
    files.write_atomically(destination.records / f"{unit.name}.json", _record_text(record))
    if unit.split == "train":  # the baselines still read the held-out text
        unit.spool.unlink()
    return record


def finished_record(unit: Unit, destination: Destination) -> UnitRecord | None:
    """The record of a unit whose shard an interrupted preparation has finished with the same text and tokenizer.

    Reads the whole shard: a disk that was full, or a machine that lost its power, may have damaged it.
    """
    path, shard = destination.records / f"{unit.name}.json", destination.shards / unit.name
    try:
        content = read_bounded(path)
        raw = parse_json(content)
        record = UnitRecord(**{**raw["record"], "byte_counts": tuple(raw["record"]["byte_counts"])})
        if content.decode() != _record_text(record):
            return None
        found = (files.sha256_of_file(bin_path(shard)), bin_path(shard).stat().st_size, idx_path(shard).stat().st_size)
        num_documents = Shard(shard).num_documents
    except (OSError, ValueError, TypeError, KeyError, DataError):
        return None  # no record, or one of another version: write the shard again
    same = (record.documents_sha256, record.tokenizer_sha256) == (unit.documents_sha256, destination.tokenizer_sha256)
    whole = found == (record.bin_sha256, record.bin_bytes, record.idx_bytes) and num_documents == record.num_documents
    return record if same and whole else None


def _record_text(record: UnitRecord) -> str:
    """A record's file: its content, and the SHA-256 of that."""
    content = asdict(record)
    return json.dumps({"record": content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()})


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], limit: int = BATCH_CHARACTERS) -> list[list[int]]:
    """The token ids of each text; one of more than `limit` characters is encoded in parts, to save memory."""
    parts = [list(cut(text, limit)) for text in texts]
    firsts = tokenizer.encode_batch([text[0] for text in parts])
    rests = iter(tokenizer.encode_rests([part for text in parts for part in text[1:]]))
    return [[*first, *(i for _ in text[1:] for i in next(rests))] for text, first in zip(parts, firsts, strict=True)]


def cut(text: str, limit: int = BATCH_CHARACTERS) -> Iterator[str]:
    """Cut a text into parts of at most `limit` characters, at a line end if possible.

    A line end between visible characters is best: GPT-2's word pattern ends a word there anyway, so that the cut does
    not change the tokens. In a line that is longer than a part, so is the place before a space.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        while end > start and (text[end : end + 1].isspace() or text[end - 2 : end - 1].isspace()):
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start else _before_a_space(text, start, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _before_a_space(text: str, start: int, stop: int) -> int:
    """The last place up to `stop` with a visible character, a space and a visible character; `stop` if there is none."""
    end = text.rfind(" ", start + 1, stop)
    for _ in range(1000):  # of a text of spaces only, look at these
        if end < 0 or not (text[end - 1].isspace() or text[end + 1 : end + 2].isspace()):
            break
        end = text.rfind(" ", start + 1, end)
    return end if end > start else stop


def _encoded(unit: Unit, tokenizer: Tokenizer, update: Callable[[bytes], None]) -> Iterator[tuple[str, list[int]]]:
    """The texts of a unit with their token ids, in order; `update` gets the SHA-256 of each."""

    def documents() -> Iterator[bytes]:
        for content in spooled_documents(unit.spool):
            update(hashlib.sha256(content).digest())
            yield content

    try:
        for batch in batches(documents()):
            yield from zip(batch, encode_documents(tokenizer, batch), strict=True)
    except UnicodeDecodeError as error:
        raise changed(unit.spool) from error


def batches(documents: Iterable[bytes], limit: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Lists of consecutive documents with at most `limit` characters in total; a longer document is a list of its own."""
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
    assert sha256, "part of the cache key: the folder can be rewritten with another tokenizer"
    return load_tokenizer(folder)


def _start_worker() -> None:
    """Set up a worker process: one thread, no traceback at Ctrl-C, and exit when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["RAYON_NUM_THREADS"] = "1"  # tokenizers reads it when it starts its threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()  # a killed parent cannot stop its workers
