"""Finished Megatron shards are used without a copy, split by document; those of another tokenizer are refused."""

import os
from pathlib import Path

import pytest

from dsllm.config.data import SourceConfig, TokenizerConfig
from dsllm.data.manifest import check_shards
from dsllm.data.shards import Shard, ShardWriter, shard_dtype
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import DataError
from dsllm.prepare.train_tokenizer import train_tokenizer
from tests.helpers.preparing import GOLDEN, prepared, tiny_run, write_jsonl

TEST_DATA = os.environ.get("DSLLM_TEST_DATA")


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    train_tokenizer([GOLDEN.read_text()[:5000]], TokenizerConfig(vocab_size=300), print).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write(prefix: Path, documents: list[list[int]]) -> str:
    with ShardWriter(prefix, shard_dtype(300)) as writer:
        for ids in documents:
            writer.add_document(ids)
    return str(prefix)


def run(tokenizer: Path, *paths: str, **data: object):
    source = SourceConfig(name="m", kind="megatron", paths=paths)
    return tiny_run([source], TokenizerConfig(kind="pretrained", path=str(tokenizer)), **data)


def test_the_last_documents_are_held_out_over_all_shards(tokenizer_folder: Path, tmp_path: Path):
    """Documents of 1, 2, 3, ... tokens, so that a wrong boundary shows."""
    documents = [[n] * n + [0] for n in range(1, 11)]
    write(tmp_path / "a.v1", documents[:4])
    write(tmp_path / "b", documents[4:8])
    write(tmp_path / "c", documents[8:])
    config = run(tokenizer_folder, f"{tmp_path}/a.v1", f"{tmp_path}/b.bin", f"{tmp_path}/[c].idx", validation_share=0.4)
    manifest, card, lines = prepared(config, tmp_path / "data")
    (source,) = manifest.sources

    def documents_of(records) -> list[int]:
        return [i for r in records for i in Shard(Path(r.prefix)).read(r.first_token, r.first_token + r.num_tokens)]

    assert documents_of(source.train) == [i for document in documents[:6] for i in document]
    assert documents_of(source.validation) == [i for document in documents[6:] for i in document]
    assert [r.num_documents for r in (*source.train, *source.validation)] == [4, 2, 2, 2]
    assert all(Path(record.prefix).is_absolute() for record in manifest.records())
    check_shards(tmp_path / "data", manifest)
    assert card["splits"]["train"]["bytes"] is None and card["baselines"] == {}
    assert lines == []


def test_shards_and_text_can_be_mixed(tokenizer_folder: Path, tmp_path: Path):
    write(tmp_path / "a", [[1, 2, 0], [3, 0]])
    config = run(tokenizer_folder, f"{tmp_path}/a")
    text = SourceConfig(name="t", paths=(str(write_jsonl(tmp_path / "t.jsonl", ["one", "two"])),))
    config = tiny_run([*config.data.sources, text], config.tokenizer, validation_share=0.5)
    manifest, card, _ = prepared(config, tmp_path / "data")
    assert [source.name for source in manifest.sources] == ["m", "t"]
    assert card["splits"]["validation"]["documents"] == 2
    assert card["baselines"]["num_documents"] == 1


def test_ids_that_the_tokenizer_does_not_have_are_refused(tokenizer_folder: Path, tmp_path: Path):
    write(tmp_path / "a", [[1, 2, 0], [5, 300, 0]])
    with pytest.raises(
        DataError, match=r"a\.bin contains token id 300, but the tokenizer has 300 ids: set tokenizer\.path"
    ):
        prepared(run(tokenizer_folder, f"{tmp_path}/a"), tmp_path / "data")


def test_documents_without_an_end_are_reported(tokenizer_folder: Path, tmp_path: Path):
    write(tmp_path / "a", [[1, 2], [3, 4]])
    _, _, lines = prepared(run(tokenizer_folder, f"{tmp_path}/a"), tmp_path / "data")
    assert any(
        "ends without <|endoftext|>, id 0; training cannot see where its documents end" in line for line in lines
    )


def test_what_cannot_be_adopted_is_named(tokenizer_folder: Path, tmp_path: Path):
    write(tmp_path / "one", [[1, 0]])
    with pytest.raises(DataError, match=r"only one document, so none can be held out: set data\.validation_share: 0"):
        prepared(run(tokenizer_folder, f"{tmp_path}/one"), tmp_path / "data")
    with pytest.raises(DataError, match=r"none\.idx"):
        prepared(run(tokenizer_folder, f"{tmp_path}/none"), tmp_path / "data")
    with pytest.raises(DataError, match=r"x\*\.idx matches nothing"):
        prepared(run(tokenizer_folder, f"{tmp_path}/x*"), tmp_path / "data")
    untrained = tiny_run(run(tokenizer_folder, f"{tmp_path}/one").data.sources)
    with pytest.raises(DataError, match=r"source 'm' consists of finished token ids: set tokenizer\.kind: pretrained"):
        prepared(untrained, tmp_path / "data")


@pytest.mark.skipif(not TEST_DATA, reason="DSLLM_TEST_DATA names no folder of shards that Megatron wrote")
def test_shards_that_megatron_wrote_are_adopted(tmp_path: Path):
    folder = Path(TEST_DATA or "")
    config = run(folder / "tokenizers" / "gpt2_tokenizer.json", f"{folder}/megatron/c4_gpt2_*", validation_share=0.1)
    manifest, _, _ = prepared(config, tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    (first, *_), (last, *_) = manifest.sources[0].train, manifest.sources[0].validation
    text = tokenizer.decode(Shard(Path(first.prefix)).read(0, 200).tolist())
    assert text.isprintable() or "\n" in text
    before = Shard(Path(last.prefix)).read(last.first_token - 1, last.first_token)
    assert before.tolist() == [tokenizer.end_of_text_id]


@pytest.mark.parametrize("path", ["", "~nobody-of-this-name/a", "a\0b"])
def test_what_is_not_a_path_is_refused_in_words(path: str, tokenizer_folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"source 'm': .* is not a path: "):
        prepared(run(tokenizer_folder, path), tmp_path / "data")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_pipe_is_not_opened(suffix: str, tokenizer_folder: Path, tmp_path: Path):
    prefix = write(tmp_path / "a", [[1, 0], [2, 0]])
    os.remove(prefix + suffix)
    os.mkfifo(prefix + suffix)
    with pytest.raises(DataError, match=rf"a\{suffix}: .*(a device, a pipe or a socket)"):
        prepared(run(tokenizer_folder, prefix), tmp_path / "data")
