"""Prepares a run's data: reads the sources, trains or loads the tokenizer, writes token shards and the data card."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsllm import files
from dsllm.byte_units import MEGABYTE
from dsllm.config.data import SourceConfig
from dsllm.config.run import RunConfig
from dsllm.data import manifest as manifests
from dsllm.data.manifest import Manifest, ShardRecord, SourceRecord, TokenizerRecord
from dsllm.data.shards import shard_dtype
from dsllm.data.tokenizer import Tokenizer
from dsllm.data.tokenizer_files import load_pretrained, load_tokenizer
from dsllm.errors import DataError
from dsllm.prepare.adopt_shards import adopt_shards
from dsllm.prepare.baselines import measure_baselines
from dsllm.prepare.card import make_card
from dsllm.prepare.check_prepared import check_prepared
from dsllm.prepare.reading import Progress, Reading, TrainingSample
from dsllm.prepare.settings import EMBEDDED_CORPUS, reads_default_corpus
from dsllm.prepare.train_tokenizer import train_tokenizer
from dsllm.prepare.units import Unit, spool_path
from dsllm.prepare.workspace import (
    CARD_FILE,
    MANIFEST_FILES,
    Workspace,
    check_replaceable,
    content_of,
    not_written,
    open_workspace,
    prepared_before,
    real_directory,
)
from dsllm.prepare.write_shards import Destination, UnitRecord, finished_record, write_shards
from dsllm.processes import num_cores

T = TypeVar("T")
Report = Callable[[str], None]


def no_progress(what: str, done: float, total: float | None) -> None:
    """Ignores progress."""


def prepare(
    config: RunConfig, directory: Path, report: Report, progress: Progress = no_progress, force: bool = False
) -> Manifest:
    """Prepare the token shards of a run in `directory`, and return their manifest.

    Verifies a directory that was prepared with the same settings, and leaves it alone. Continues an interrupted
    preparation: shards finished with the same text and tokenizer are used again.

    Args:
        report: called with a line of text for each step and warning.
        progress: called often with the activity and the megabytes done.
        force: prepare again even if the directory is prepared, with the same or other settings.

    Raises:
        DataError: a source or the tokenizer cannot be used, the directory contains other files, another process is
            preparing it, or the disk is full.
    """
    if _megatron(config) and config.tokenizer.kind != "pretrained":
        raise DataError(
            f"source '{_megatron(config)[0].name}' consists of finished token ids: set tokenizer.kind: pretrained and "
            "tokenizer.path to the tokenizer that made them"
        )
    settings = manifests.settings_of(config)
    if reads_default_corpus(config.data):
        report(EMBEDDED_CORPUS)
    try:
        directory = real_directory(directory)
        if not force and (ready := prepared_before(directory, settings)) is not None:
            check_prepared(directory, ready, progress)
            report(
                f"{directory} is prepared already with these settings: nothing to do (--force reads the sources again)"
            )
            return ready
        check_replaceable(directory, force)
        with open_workspace(directory, report, force) as workspace:
            if not force and (ready := prepared_before(directory, settings)) is not None:
                return ready  # another process prepared it before we got the lock
            if not force and (ready := _complete(workspace, settings, progress)) is not None:
                report("publishing what an earlier attempt had completed")
                workspace.publish({record.prefix for record in ready.records()})
                return ready
            return _Preparation(config, workspace, report, progress).run(settings)
    except OSError as error:
        raise not_written(directory, error, "used") from error


def _complete(workspace: Workspace, settings: dict[str, Any], progress: Progress) -> Manifest | None:
    """The manifest of an earlier attempt that was ended just before its folder got its final name; None otherwise."""
    try:
        ready = prepared_before(workspace.aside, settings)
        if ready is not None:
            check_prepared(workspace.aside, ready, progress)
    except DataError:
        ready = None
    if ready is None:  # a manifest of other settings must not stay next to the shards of these
        for name in MANIFEST_FILES:
            (workspace.aside / name).unlink(missing_ok=True)
    return ready


@dataclass
class _Preparation:
    """One preparation, while it holds the lock."""

    config: RunConfig
    workspace: Workspace
    report: Report
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, settings: dict[str, Any]) -> Manifest:
        """Run all steps of the preparation in order, and publish the result."""
        with self._timed("total"):
            adopted: dict[str, SourceRecord] = {}
            if self.config.tokenizer.kind == "pretrained":
                wanted = self.config.tokenizer
                tokenizer = load_pretrained(wanted.path or "", wanted.end_of_text, wanted.begin_of_text)
                for note in tokenizer.notes:
                    self.report(f"tokenizer: {note}")
                adopted = self._adopt(tokenizer)
                destination = self._save(tokenizer)
                with self._timed("reading_and_writing"):
                    reading, records = self._read(lambda units: list(self._write(units, destination)))
            else:
                with self._timed("reading"):
                    reading, units = self._read(list)
                with self._timed("tokenizer"):
                    tokenizer, destination = self._train_or_load(reading.sample)
                with self._timed("writing"):
                    records = list(self._write(units, destination))
            records.sort(key=lambda record: (record.source, record.split, record.number))
            with self._timed("baselines"):
                baselines = self._baselines(records)
        manifest = _manifest(self.config, settings, tokenizer, destination, records, adopted)
        card = make_card(self.config, manifest, tokenizer, reading.counts, records)
        card |= {"baselines": baselines, "seconds": {key: round(value, 2) for key, value in self.seconds.items()}}
        files.write_atomically(self.workspace.aside / CARD_FILE, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        manifests.write_manifest(self.workspace.aside, manifest)
        self.workspace.publish({record.name for record in records})
        return manifest

    def _read(self, use: Callable[[Iterator[Unit]], T]) -> tuple[Reading, T]:
        """Read all sources and pass their units to `use`; a second time if the first holds out no document.

        Raises:
            DataError: there are too few documents to both train and validate.
        """
        data = self.config.data
        sample_bytes = (
            0 if self.config.tokenizer.kind == "pretrained" else round(self.config.tokenizer.train_megabytes * MEGABYTE)
        )
        reading = Reading(data, self.workspace.spool, self.progress, sample_bytes)
        result = use(reading.units())
        num_train, num_held_out = reading.total("train"), reading.total("validation")
        if data.validation_share > 0 and num_held_out == 0 and num_train > 1:
            self.report(
                f"validation: data.validation_share {data.validation_share} selects none of the {num_train} documents; "
                "the one with the smallest hash is held out"
            )
            reading = reading.hold_out_one()
            result = use(reading.units())
        elif data.validation_share > 0 and num_train + num_held_out == 1:
            raise DataError(
                "the sources have only one document, so none can be held out: split it (text_documents: paragraphs, for a "
                ".txt file), add text, or set data.validation_share: 0"
            )
        elif num_train == 0 and num_held_out > 0:
            raise DataError(
                f"all {num_held_out} documents are held out: lower data.validation_share {data.validation_share}"
            )
        return reading, result

    def _adopt(self, tokenizer: Tokenizer) -> dict[str, SourceRecord]:
        share = self.config.data.validation_share
        finished = _megatron(self.config)
        return {source.name: adopt_shards(source, tokenizer, share, self.report) for source in finished}

    def _train_or_load(self, sample: TrainingSample) -> tuple[Tokenizer, Destination]:
        """Train a tokenizer from the sample, or load the one that an interrupted preparation trained from it."""
        inputs = {
            "config": manifests.tokenizer_settings(self.config.tokenizer),
            "sample_sha256": sample.sha256(),
            "libraries": {name: metadata.version(name) for name in ("tokenizers", "sentencepiece")},
        }
        record = self.workspace.records / "tokenizer.json"
        if record.is_file() and self.workspace.tokenizer.is_dir():
            destination = self._destination()
            # The checksum too: another preparation may have put its own tokenizer here, and been interrupted.
            if content_of(record) == inputs | {"sha256": destination.tokenizer_sha256}:
                self.report("tokenizer: kept from the interrupted preparation")
                return load_tokenizer(self.workspace.tokenizer), destination
        self.report(
            f"tokenizer: training {self.config.tokenizer.kind} from {sample.num_bytes / MEGABYTE:.1f} MB of text"
        )
        tokenizer = train_tokenizer(sample.texts(), self.config.tokenizer, self.report)
        destination = self._save(tokenizer)
        files.write_atomically(record, json.dumps(inputs | {"sha256": destination.tokenizer_sha256}))
        return tokenizer, destination

    def _save(self, tokenizer: Tokenizer) -> Destination:
        """Save the tokenizer where the workers load it."""
        shutil.rmtree(self.workspace.tokenizer, ignore_errors=True)
        tokenizer.save(self.workspace.tokenizer)
        return self._destination()

    def _destination(self) -> Destination:
        """Where the workers write shards, with the tokenizer that was saved."""
        return Destination(
            shards=self.workspace.aside,
            records=self.workspace.records,
            tokenizer=self.workspace.tokenizer,
            tokenizer_sha256=files.sha256_of_folder(self.workspace.tokenizer),
        )

    def _write(self, units: Iterable[Unit], destination: Destination) -> Iterator[UnitRecord]:
        """Write the shards that are not finished yet; yields the records of all."""
        finished: list[UnitRecord] = []
        total_megabytes = sum(unit.text_bytes for unit in units) / MEGABYTE if isinstance(units, list) else None

        def unfinished() -> Iterator[Unit]:
            for unit in units:
                record = finished_record(unit, destination)
                if record is None:
                    yield unit
                    continue
                finished.append(record)
                if unit.split == "train":  # the baselines still read the held-out text
                    unit.spool.unlink()

        done = 0.0
        if total_megabytes is not None:
            self.progress("writing token shards", done, total_megabytes)
        for record in write_shards(unfinished(), destination, self.config.data.num_workers or num_cores()):
            yield record
            done += record.text_bytes / MEGABYTE
            kept = sum(r.text_bytes for r in finished) / MEGABYTE
            self.progress("writing token shards", done + kept, total_megabytes)
        if finished:
            self.report(f"shards: {len(finished)} kept from the interrupted preparation")
        yield from finished

    def _baselines(self, records: list[UnitRecord]) -> dict[str, Any]:
        """Measure the baselines on the held-out text, in the order of the manifest."""
        counts = np.sum([r.byte_counts for r in records if r.split == "train"], axis=0)
        held_out = [
            r
            for source in self.config.data.sources
            for r in records
            if (r.source, r.split) == (source.name, "validation")
        ]
        return measure_baselines([spool_path(self.workspace.spool, r.name) for r in held_out], counts)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - started


def _megatron(config: RunConfig) -> list[SourceConfig]:
    return [source for source in config.data.sources if source.kind == "megatron"]


def _manifest(
    config: RunConfig,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    destination: Destination,
    records: list[UnitRecord],
    adopted: dict[str, SourceRecord],
) -> Manifest:
    def written(source: str, split: str) -> tuple[ShardRecord, ...]:
        return tuple(_shard_record(r) for r in records if (r.source, r.split) == (source, split))

    return Manifest(
        settings=settings,
        settings_sha256=manifests.hash_of(settings),
        tokenizer=TokenizerRecord(
            directory=destination.tokenizer.name,
            sha256=destination.tokenizer_sha256,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
        ),
        sources=tuple(
            adopted.get(source.name)
            or SourceRecord(
                name=source.name, train=written(source.name, "train"), validation=written(source.name, "validation")
            )
            for source in config.data.sources
        ),
        dtype=shard_dtype(tokenizer.vocab_size).name,
    )


def _shard_record(record: UnitRecord) -> ShardRecord:
    return ShardRecord(
        prefix=record.name,
        num_tokens=record.num_tokens,
        num_documents=record.num_documents,
        text_bytes=record.text_bytes,
        bin_bytes=record.bin_bytes,
        idx_bytes=record.idx_bytes,
        bin_sha256=record.bin_sha256,
    )
