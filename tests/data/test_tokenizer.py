"""Tokenizers give back every text exactly, never read special tokens out of text, and load from every known file."""

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers

from dsllm.config.data import TokenizerConfig
from dsllm.data.tokenizer import Tokenizer
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import DataError
from dsllm.files import sha256_of_folder
from dsllm.prepare.train_tokenizer import train_tokenizer
from tests.helpers.preparing import GOLDEN, HARD_TEXTS

KINDS = ("byte_bpe", "sentencepiece_unigram", "sentencepiece_bpe")
TEST_DATA = os.environ.get("DSLLM_TEST_DATA")


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    text = GOLDEN.read_text()[:20_000]
    return train_tokenizer([text], TokenizerConfig(kind=request.param, vocab_size=500), lambda line: None)


@pytest.fixture(scope="module")
def byte_bpe() -> Tokenizer:
    return train_tokenizer([GOLDEN.read_text()[:20_000]], TokenizerConfig(vocab_size=300), lambda line: None)


def test_every_text_round_trips(trained: Tokenizer):
    generator = random.Random(1)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [*HARD_TEXTS, GOLDEN.read_text(), "".join(generator.choices(characters, k=2000))]
    for text in texts:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.decode_bytes(ids) == text.encode()
        assert all(0 <= i < trained.vocab_size for i in ids)


def test_a_batch_is_encoded_as_its_texts(trained: Tokenizer):
    assert trained.encode_batch(HARD_TEXTS) == [trained.encode(text) for text in HARD_TEXTS]


def test_end_of_text_written_in_a_document_does_not_end_it(trained: Tokenizer):
    ids = trained.encode(f"before {trained.end_of_text} after")
    assert trained.end_of_text_id not in ids
    assert trained.decode([*ids, trained.end_of_text_id]) == f"before {trained.end_of_text} after"
    assert trained.decode_bytes([trained.end_of_text_id]) == b""


def test_a_saved_tokenizer_is_the_same(trained: Tokenizer, tmp_path: Path):
    trained.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert sha256_of_folder(tmp_path / "a") == sha256_of_folder(tmp_path / "b")
    assert loaded.encode(GOLDEN.read_text()) == trained.encode(GOLDEN.read_text())
    assert (loaded.kind, loaded.vocab_size, loaded.end_of_text_id) == (
        trained.kind,
        trained.vocab_size,
        trained.end_of_text_id,
    )


def test_byte_level_bpe_spells_each_byte(byte_bpe: Tokenizer):
    assert {byte_bpe.decode_bytes([i]) for i in range(byte_bpe.vocab_size)} >= {bytes([byte]) for byte in range(256)}


def test_vocab_and_merges_are_the_same_tokenizer_as_the_json(byte_bpe: Tokenizer, tmp_path: Path):
    _, content = byte_bpe.model_file()
    tokenizers.Tokenizer.from_str(content.decode()).model.save(str(tmp_path))
    for path in (tmp_path, tmp_path / "vocab.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode(GOLDEN.read_text()) == byte_bpe.encode(GOLDEN.read_text())
        assert loaded.end_of_text_id == byte_bpe.end_of_text_id


def test_settings_that_would_change_documents_are_not_obeyed(byte_bpe: Tokenizer, tmp_path: Path):
    tokenizer = tokenizers.Tokenizer.from_str(byte_bpe.model_file()[1].decode())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "much more than five tokens of text"
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(text) == loaded.encode_batch([text])[0] == byte_bpe.encode(text)


def test_an_end_of_text_that_the_file_does_not_mark_as_special_is_not_read_out_of_text(
    byte_bpe: Tokenizer, tmp_path: Path
):
    content = json.loads(byte_bpe.model_file()[1])
    content["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded.end_of_text_id == byte_bpe.end_of_text_id
    assert loaded.encode("a<|endoftext|>") == byte_bpe.encode("a<|endoftext|>")


def test_a_tokenizer_without_the_end_of_text_names_those_it_has(trained: Tokenizer, tmp_path: Path):
    name, content = trained.model_file()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"no special token '</s>'.*tokenizer\.end_of_text.*<\|endoftext\|>"):
        load_tokenizer(tmp_path / name, "</s>")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "spiece.model"])
def test_what_is_no_tokenizer_is_named(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\xff\x00 no tokenizer")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"contains no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"needs merges\.txt in the same folder"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not TEST_DATA, reason="DSLLM_TEST_DATA names no folder of real tokenizers")
def test_published_tokenizers_load_and_round_trip():
    folder = Path(TEST_DATA or "") / "tokenizers"
    published = {
        "gpt2-vocab.json": ("<|endoftext|>", 50257),
        "gpt2_tokenizer.json": ("<|endoftext|>", 50257),
        "gpt_neox_20B_tokenizer.json": ("<|endoftext|>", 50277),
        "olmo2_dolma2_tokenizer.json": ("<|endoftext|>", 100278),
        "mistral_v1.model": ("</s>", 32000),
    }
    ids = {}
    for name, (end_of_text, vocab_size) in published.items():
        tokenizer = load_tokenizer(folder / name, end_of_text)
        assert tokenizer.vocab_size == vocab_size
        ids[name] = tokenizer.encode(GOLDEN.read_text()[:5000])
        assert tokenizer.decode(ids[name]) == GOLDEN.read_text()[:5000]
    assert ids["gpt2-vocab.json"] == ids["gpt2_tokenizer.json"]
    assert json.loads((folder / "gpt2-vocab.json").read_text())["First"] == ids["gpt2-vocab.json"][0]
