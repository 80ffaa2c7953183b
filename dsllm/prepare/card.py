"""Makes the data card as plain values: what was read and dropped, the splits, and the tokenizer's figures."""

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from dsllm.config.run import RunConfig
from dsllm.data.manifest import Manifest, SourceRecord
from dsllm.data.tokenizer import Tokenizer
from dsllm.errors import DataError
from dsllm.prepare.reading import SPLITS, SourceCount
from dsllm.prepare.workspace import CARD_FILE
from dsllm.prepare.write_shards import UnitRecord
from dsllm.untrusted_files import UntrustedFileError, read_json

FORMAT_VERSION = 1
_PACKAGES = ("numpy", "tokenizers", "sentencepiece", "pyarrow", "datasets")


def make_card(
    config: RunConfig,
    manifest: Manifest,
    tokenizer: Tokenizer,
    counts: dict[str, SourceCount],
    records: Iterable[UnitRecord],
) -> dict[str, Any]:
    """The data card without baselines and times, which the pipeline adds.

    Args:
        counts: what was read, by source; sources of finished shards have no entry.
        records: of the shards written here.
    """
    records = list(records)
    sources = [_source(record, counts.get(record.name), records) for record in manifest.sources]
    splits = {split: _sum(source[split] for source in sources) for split in SPLITS}
    return {
        "format_version": FORMAT_VERSION,
        "settings": manifest.settings,
        "settings_sha256": manifest.settings_sha256,
        "sources": sources,
        "splits": splits,
        "tokenizer": {
            "kind": config.tokenizer.kind,
            "library": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "end_of_text_id": tokenizer.end_of_text_id,
            "begin_of_text": tokenizer.begin_of_text,
            "begin_of_text_id": tokenizer.begin_of_text_id,
            "sha256": manifest.tokenizer.sha256,
            "train_bytes_per_token": splits["train"]["bytes_per_token"],
            "held_out_bytes_per_token": splits["validation"]["bytes_per_token"],
            "held_out_documents_not_round_trip": sum(r.num_not_round_trip for r in records),
        },
        "dtype": manifest.dtype,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }


def read_card(directory: Path) -> dict[str, Any]:
    """The data card of a prepared directory.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        card = read_json(directory / CARD_FILE)
    except FileNotFoundError as error:
        raise not_a_card(directory, "it is missing") from error
    except OSError as error:
        raise DataError(f"{directory / CARD_FILE}: cannot be read: {error.strerror}") from error
    except UntrustedFileError as error:
        raise not_a_card(directory, str(error)) from error
    if not isinstance(card, dict):
        raise not_a_card(directory, f"it is {type(card).__name__}")
    return card


def not_a_card(directory: Path, why: str) -> DataError:
    """The error that the data card cannot be used; the data itself is prepared."""
    return DataError(
        f"{directory / CARD_FILE}: not a data card ({why}). The token shards are prepared; to have a card again, copy it, or "
        "prepare them again by `dsllm prepare CONFIG --force`"
    )


def _source(record: SourceRecord, count: SourceCount | None, records: list[UnitRecord]) -> dict[str, Any]:
    """One source: documents read and dropped by reason, and its splits."""
    source: dict[str, Any] = {"name": record.name}
    if count is not None:
        source["read"] = {
            "documents": count.read,
            "kept": sum(count.kept.values()),
            "duplicates": count.duplicates,
            "empty": count.empty,
            "bad": count.bad.total(),
            "bad_by_reason": dict(count.bad.most_common()),
            "bad_examples": count.bad_examples,
            "remarks": dict(count.remarks.most_common()),
            "remark_examples": count.remark_examples,
            "files": count.num_files,
            "ignored_files_by_suffix": dict(count.ignored_files.most_common()),
            "cut_at_megabytes": count.cut_at_megabytes,
        }
    for split, shards in (("train", record.train), ("validation", record.validation)):
        text_bytes = [shard.text_bytes for shard in shards]
        source[split] = _with_ratio(
            {
                "documents": sum(shard.num_documents for shard in shards),
                "tokens": sum(shard.num_tokens for shard in shards),
                "bytes": None if None in text_bytes else sum(size for size in text_bytes if size is not None),
                "shards": len(shards),
            }
        )
    source["held_out_documents_not_round_trip"] = sum(r.num_not_round_trip for r in records if r.source == record.name)
    return source


def _sum(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Totals of one split over all sources; bytes are None if one source does not know its bytes."""
    parts = list(parts)
    total: dict[str, Any] = {key: sum(part[key] for part in parts) for key in ("documents", "tokens", "shards")}
    sizes = [part["bytes"] for part in parts]
    total["bytes"] = None if None in sizes else sum(sizes)
    return _with_ratio(total)


def _with_ratio(part: dict[str, Any]) -> dict[str, Any]:
    """Add bytes per token, without the end-of-text tokens, which stand for no text."""
    tokens = part["tokens"] - part["documents"]
    part["bytes_per_token"] = part["bytes"] / tokens if part["bytes"] and tokens > 0 else None
    return part
