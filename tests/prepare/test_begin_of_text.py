"""Documents begin with the begin-of-text token where the run asks for one, and what a tokenizer asks for is reported."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dsllm.config.data import SourceConfig, TokenizerConfig
from dsllm.config.load import load_run
from dsllm.data.manifest import settings_of
from dsllm.data.shards import Shard
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import ConfigError
from tests.helpers.preparing import GOLDEN, golden_run, prepared, tiny_run, write_jsonl
from tests.helpers.tokenizer_files import byte_level, changed, template


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe", "pretrained"])
def test_documents_begin_with_the_begin_of_text_where_it_is_asked_for(kind: str, tmp_path: Path):
    """And the words of both tokens in a text stay text."""
    begin, end = "<|begin|>", "<|endoftext|>"
    texts = [f"{word} says {begin} and {end} to all of them" * 3 for word in GOLDEN.read_text().split()[:200]]
    source = SourceConfig(name="s", paths=(str(write_jsonl(tmp_path / "a.jsonl", texts)),))
    fields: dict[str, Any] = {"kind": kind, "vocab_size": 320, "begin_of_text": begin}
    if kind == "pretrained":
        (tmp_path / "tokenizer.json").write_text(changed(byte_level(), post_processor=template(f"{begin} $A {end}")))
        fields["path"] = str(tmp_path / "tokenizer.json")
    config = tiny_run([source], TokenizerConfig(**fields), deduplicate=False, validation_share=0.1)
    manifest, card, lines = prepared(config, tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    assert (card["tokenizer"]["begin_of_text"], card["tokenizer"]["begin_of_text_id"]) == (
        begin,
        tokenizer.begin_of_text_id,
    )
    assert not [line for line in lines if "begin" in line]
    found = []
    for record in (*manifest.sources[0].train, *manifest.sources[0].validation):
        ids = [int(i) for i in Shard(tmp_path / "data" / record.prefix).read(0, record.num_tokens)]
        assert ids.count(tokenizer.begin_of_text_id) == ids.count(tokenizer.end_of_text_id) == record.num_documents
        start = 0
        while start < len(ids):
            stop = ids.index(tokenizer.end_of_text_id, start)
            assert ids[start] == tokenizer.begin_of_text_id
            found.append(tokenizer.decode(ids[start : stop + 1]))
            start = stop + 1
    assert sorted(found) == sorted(texts)


def test_what_a_pretrained_tokenizer_asks_for_and_does_not_get_is_reported(tmp_path: Path):
    source = SourceConfig(name="s", paths=(str(GOLDEN),), text_documents="paragraphs")
    content = changed(byte_level(), post_processor=template("<|begin|> $A"), model_dropout=0.25)
    (tmp_path / "tokenizer.json").write_text(content)
    config = tiny_run([source], TokenizerConfig(kind="pretrained", path=str(tmp_path)), validation_share=0.1)
    _, _, lines = prepared(config, tmp_path / "data")
    assert any("BPE dropout 0.25" in line and "switched off" in line for line in lines)
    assert any("begin without <|begin|>" in line and "tokenizer.begin_of_text" in line for line in lines)


def test_data_prepared_before_begin_of_text_existed_is_still_the_same(tmp_path: Path):
    config = golden_run()
    assert "begin_of_text" not in settings_of(config)["tokenizer"]
    other = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, begin_of_text="<s>"))
    assert settings_of(other)["tokenizer"]["begin_of_text"] == "<s>"


@pytest.mark.parametrize(
    ("token", "message"), [("", "must not be empty"), ("<|endoftext|>", "must not be the end_of_text")]
)
def test_a_begin_of_text_that_cannot_be_is_refused(token: str, message: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text("run: {name: a}\n")
    with pytest.raises(ConfigError, match=rf"tokenizer\.begin_of_text.*{message}"):
        load_run(tmp_path / "run.yaml", [f"tokenizer.begin_of_text={token!r}"])
