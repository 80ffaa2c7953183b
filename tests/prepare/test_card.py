"""The data card's figures add up, and it does not guess what is unknown."""

import json
import os
from pathlib import Path

import pytest

from dsllm.config.data import SourceConfig, TokenizerConfig
from dsllm.data.shards import ShardWriter, shard_dtype
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import DataError
from dsllm.prepare.card import read_card
from tests.helpers.preparing import GOLDEN, golden_run, prepared, tiny_run, write_jsonl

SPLITS = ("train", "validation")


def text_source(name: str, **fields: object) -> SourceConfig:
    return SourceConfig(name=name, text_documents="paragraphs", **fields)


def test_the_splits_are_the_sums_of_the_sources(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {n}" for n in range(50)])
    sources = [text_source("golden", paths=(str(GOLDEN),)), text_source("small", paths=(str(path),))]
    manifest, card, _ = prepared(tiny_run(sources, validation_share=0.2), tmp_path / "data")
    for split in SPLITS:
        for key in ("documents", "tokens", "bytes", "shards"):
            assert card["splits"][split][key] == sum(source[split][key] for source in card["sources"])
        part = card["splits"][split]
        # every document ends with one end-of-text token, which stands for no text
        assert part["bytes_per_token"] == part["bytes"] / (part["tokens"] - part["documents"])
        assert part["tokens"] == sum(r.num_tokens for source in manifest.sources for r in getattr(source, split))
    for source in card["sources"]:
        read = source["read"]
        assert read["kept"] == sum(source[split]["documents"] for split in SPLITS)
        assert read["documents"] == read["kept"] + read["duplicates"] + read["empty"] + read["bad"]
    assert card["tokenizer"]["sha256"] == manifest.tokenizer.sha256


def test_bytes_are_unknown_where_one_source_does_not_know_them(tmp_path: Path):
    prepared(golden_run(), tmp_path / "first")
    tokenizer = load_tokenizer(tmp_path / "first" / "tokenizer")
    with ShardWriter(tmp_path / "shard", shard_dtype(tokenizer.vocab_size)) as writer:
        for _ in range(2):
            writer.add_document([1, tokenizer.end_of_text_id])
    sources = [
        SourceConfig(name="finished", kind="megatron", paths=(str(tmp_path / "shard"),)),
        text_source("golden", paths=(str(GOLDEN),)),
    ]
    pretrained = TokenizerConfig(kind="pretrained", path=str(tmp_path / "first" / "tokenizer"))
    _, card, _ = prepared(tiny_run(sources, pretrained), tmp_path / "data")
    finished, golden = card["sources"]
    assert "read" not in finished and finished["train"]["bytes"] is None and golden["train"]["bytes"] > 0
    assert card["splits"]["train"]["bytes"] is None and card["splits"]["train"]["bytes_per_token"] is None
    assert card["splits"]["train"]["documents"] == 1 + golden["train"]["documents"]
    assert json.loads(json.dumps(card)) == card


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "it is missing"),
        (b"", "is empty"),
        (b"{", "is not readable JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "is not UTF-8"),
        (b"null", "it is NoneType"),
        (b"[1]", "it is list"),
    ],
)
def test_a_card_that_cannot_be_read_is_an_error_in_words(content: bytes | None, why: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "data_card.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_card\.json: not a data card \(.*{why}.*--force"):
        read_card(tmp_path)


def test_a_folder_or_a_pipe_as_card_is_not_opened(tmp_path: Path):
    (tmp_path / "data_card.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_card(tmp_path)
    (tmp_path / "data_card.json").rmdir()
    os.mkfifo(tmp_path / "data_card.json")
    with pytest.raises(DataError, match="a device, a pipe"):
        read_card(tmp_path)
