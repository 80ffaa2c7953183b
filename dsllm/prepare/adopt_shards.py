"""Lists finished Megatron .bin/.idx shards in a prepared directory's manifest, without copying them."""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsllm.config.data import SourceConfig
from dsllm.data.manifest import ShardRecord, SourceRecord
from dsllm.data.shards import Shard, bin_path, idx_path
from dsllm.data.tokenizer import Tokenizer
from dsllm.errors import DataError
from dsllm.prepare.find_files import path_of

_NUM_PROBES, _PROBE_TOKENS = 64, 4096  # parts of a shard whose ids are checked


def adopt_shards(
    source: SourceConfig, tokenizer: Tokenizer, validation_share: float, report: Callable[[str], None]
) -> SourceRecord:
    """Check the shards of a source and split them by document: the last documents become the validation split.

    Args:
        validation_share: share of the documents to hold out; at least one document if above 0.
        report: gets a warning for each shard whose last document has no end-of-text token.

    Raises:
        DataError: a shard is missing, damaged or empty, its .idx does not describe all of its .bin, or it contains ids that
            the tokenizer does not have.
    """
    prefixes = list(dict.fromkeys(prefix for pattern in source.paths for prefix in _prefixes(pattern, source.name)))
    shards = [Shard(prefix) for prefix in prefixes]
    for shard in shards:
        shard.check_index()
        _check_ids(shard, tokenizer, source.name, report)
    num_documents = sum(shard.num_documents for shard in shards)
    num_held_out = round(validation_share * num_documents)
    if validation_share > 0:
        num_held_out = min(max(num_held_out, 1), num_documents - 1)
        if num_held_out < 1:
            raise DataError(
                f"source '{source.name}': has only one document, so none can be held out: set data.validation_share: 0"
            )
    train: list[ShardRecord] = []
    validation: list[ShardRecord] = []
    for shard in reversed(shards):
        held_out_here = min(num_held_out, shard.num_documents)
        num_held_out -= held_out_here
        train[:0] = _part(shard, 0, shard.num_documents - held_out_here)
        validation[:0] = _part(shard, shard.num_documents - held_out_here, shard.num_documents)
    return SourceRecord(name=source.name, train=tuple(train), validation=tuple(validation))


def _part(shard: Shard, first: int, stop: int) -> Iterator[ShardRecord]:
    """The record of documents [first, stop) of a shard; yields nothing if there are none."""
    if first == stop:
        return
    whole = stop - first == shard.num_documents  # then there is no need to read the index
    start, end = (
        (0, shard.num_tokens) if whole else (int(shard.document_offsets[first]), int(shard.document_offsets[stop]))
    )
    yield ShardRecord(
        prefix=str(shard.prefix),
        first_token=start,
        num_tokens=end - start,
        num_documents=stop - first,
        text_bytes=None,
        bin_bytes=bin_path(shard.prefix).stat().st_size,
        idx_bytes=idx_path(shard.prefix).stat().st_size,
        bin_sha256=None,
    )


def _check_ids(shard: Shard, tokenizer: Tokenizer, source: str, report: Callable[[str], None]) -> None:
    """Check the ids in evenly spread parts of a shard, and that it ends with the end-of-text token."""
    if shard.num_tokens == 0 or shard.num_documents == 0:
        raise DataError(f"source '{source}': {shard.path} contains no token")
    for start in np.linspace(0, max(shard.num_tokens - _PROBE_TOKENS, 0), _NUM_PROBES, dtype=np.int64).tolist():
        ids = shard.read(start, min(start + _PROBE_TOKENS, shard.num_tokens))
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            wrong = int(ids.max() if ids.max() >= tokenizer.vocab_size else ids.min())
            raise DataError(
                f"source '{source}': {shard.path} contains token id {wrong}, but the tokenizer has {tokenizer.vocab_size} "
                "ids: set tokenizer.path to the tokenizer that made the shard"
            )
    if int(shard.read(shard.num_tokens - 1, shard.num_tokens)[0]) != tokenizer.end_of_text_id:
        report(
            f"source '{source}': {shard.path} ends without {tokenizer.end_of_text}, id {tokenizer.end_of_text_id}; "
            "training cannot see where its documents end"
        )


def _prefixes(pattern: str, source: str) -> list[Path]:
    """Absolute prefixes of the shards that a path or glob names, with or without .bin or .idx."""
    bare = str(path_of(pattern, source)).removesuffix(".bin").removesuffix(".idx")
    if not glob.has_magic(bare) or idx_path(Path(bare)).exists():
        return [Path(bare).absolute()]
    found = [Path(name.removesuffix(".idx")).absolute() for name in sorted(glob.glob(bare + ".idx", recursive=True))]
    if not found:
        raise DataError(f"source '{source}': {bare}.idx matches nothing (working directory {Path.cwd()})")
    return found
