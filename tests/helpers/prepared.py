"""Tiny prepared directories: token shards and their manifest, as `dsllm prepare` would leave them."""

from collections.abc import Sequence
from pathlib import Path

from dsllm.data.manifest import (
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    hash_of,
    write_manifest,
)
from dsllm.data.shards import ShardWriter, shard_dtype
from dsllm.files import sha256_of_folder

END_OF_TEXT = 0
Documents = Sequence[Sequence[int]]


def counting_documents(num_tokens: int, document_tokens: int = 50, first: int = 1) -> list[list[int]]:
    """Documents whose stream is first, first + 1, ...: a token's id is its place, so that none can be mistaken."""
    ids = list(range(first, first + num_tokens))
    return [ids[i : i + document_tokens] for i in range(0, num_tokens, document_tokens)]


def write_shard(directory: Path, name: str, documents: Documents, vocab_size: int) -> ShardRecord:
    """One shard of these documents, each taken to have three bytes of text per token."""
    with ShardWriter(directory / name, shard_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add_document(document)
        info = writer.close()
    return ShardRecord(
        prefix=name,
        num_tokens=info.num_tokens,
        num_documents=info.num_documents,
        text_bytes=3 * info.num_tokens,
        bin_bytes=info.bin_bytes,
        idx_bytes=info.idx_bytes,
        bin_sha256=info.bin_sha256,
    )


def write_prepared(
    directory: Path,
    train: dict[str, Sequence[Documents]],
    validation: dict[str, Sequence[Documents]] | None = None,
    vocab_size: int = 60000,
) -> Manifest:
    """A prepared directory with these documents per shard of each source, and a tokenizer folder of one small file."""
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    sources = []
    for name, shards in train.items():
        splits = {"train": shards, "validation": (validation or {}).get(name, ())}
        records = {
            split: tuple(
                write_shard(directory, f"{split}-{name}-{i:05d}", documents, vocab_size)
                for i, documents in enumerate(shards_of_split)
            )
            for split, shards_of_split in splits.items()
        }
        sources.append(SourceRecord(name=name, **records))
    manifest = Manifest(
        settings={},
        settings_sha256=hash_of({}),
        tokenizer=TokenizerRecord(
            directory="tokenizer",
            sha256=sha256_of_folder(tokenizer),
            vocab_size=vocab_size,
            end_of_text_id=END_OF_TEXT,
        ),
        sources=tuple(sources),
        dtype=shard_dtype(vocab_size).name,
    )
    write_manifest(directory, manifest)
    return manifest
