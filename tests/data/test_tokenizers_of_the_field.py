"""What tokenizers of the field do to a text: exact where they can be, and told where they change it."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import normalizers, pre_tokenizers

from dsllm.config.data import SourceConfig, TokenizerConfig
from dsllm.data.tokenizer import JsonTokenizer, SentencePieceTokenizer
from dsllm.errors import DataError
from tests.helpers.preparing import prepared, tiny_run, write_jsonl
from tests.helpers.tokenizer_files import (
    BEGIN,
    END,
    HARD,
    TEXT,
    byte_level,
    changed,
    part,
    prefixed,
    sentencepiece_model,
)

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
FAMILIES = [
    "👩‍👩‍👧 👨🏽‍💻 🏳️‍🌈",
    "e\u0301 é Å \u212b",
    "ﾊﾝｶｸ ｶﾞ",
    "\u1112\u1161\u11ab 한",
    "\0 NUL \x7f",
    "\ufeff \u2028 \u00a0",
]


def test_dropout_is_switched_off_and_said_so():
    tokenizer = JsonTokenizer(changed(byte_level(), model_dropout=0.9), END, "the file")
    assert {tuple(tokenizer.encode(TEXT[:200])) for _ in range(5)} == {
        tuple(JsonTokenizer(changed(byte_level()), END, "").encode(TEXT[:200]))
    }
    (note,) = tokenizer.notes
    assert "the file asks for BPE dropout 0.9" in note
    assert not JsonTokenizer(changed(byte_level(), model_dropout=0.0), END, "").notes


@pytest.mark.parametrize("text", [*FAMILIES, *HARD[1:5]])
@pytest.mark.parametrize("kind", ["byte-level", "bpe", "unigram"])
def test_text_and_bytes_are_exact(kind: str, text: str):
    tokenizer = (
        JsonTokenizer(changed(byte_level()), END, "")
        if kind == "byte-level"
        else SentencePieceTokenizer(sentencepiece_model(kind, add_dummy_prefix=False), END, "")
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_user_defined_symbols_of_a_sentencepiece_model_are_tokens_and_control_words_are_text():
    symbols = ["\n", "\t", "<tool>", "  "]
    tokenizer = SentencePieceTokenizer(
        sentencepiece_model("bpe", user_defined_symbols=",".join(symbols)), END, "symbols"
    )
    text = f"a\n\tb  <tool> {END} {BEGIN} \0"
    ids = tokenizer.encode(text)
    names = tokenizer.tokens()
    assert {"\n", "\t", "<tool>"} <= {names[i] for i in ids}
    assert not {tokenizer.end_of_text_id, tokenizer.special_id(BEGIN)} & set(ids)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()


LOSSY = {
    "an added token that eats spaces": changed(
        byte_level(),
        added_tokens=[
            *byte_level()["added_tokens"],
            {"id": 400, "content": "<x>", **ADDED, "lstrip": True, "rstrip": True},
        ],
    ),
    "NFKC and lower case": changed(
        byte_level(), normalizer=part(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    ),
    "no byte fallback": changed(
        prefixed(), model_byte_fallback=False, model_unk_token=None, normalizer=part(normalizers.Replace(" ", "\u2581"))
    ),
    "a prefix space": changed(byte_level(), pre_tokenizer=part(pre_tokenizers.ByteLevel(add_prefix_space=True))),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_documents_that_a_tokenizer_changes_are_counted(kind: str, tmp_path: Path):
    rng = random.Random(1)
    words = [word for word in TEXT.split() if word.islower() and word.isascii()]
    same = [" ".join(rng.choices(words, k=20)) for _ in range(30)]
    lossy = [f"a  <x>  b Ⅳ 日本 {n}" for n in range(10)]
    (tmp_path / "tokenizer.json").write_text(LOSSY[kind])
    source = SourceConfig(name="s", paths=(str(write_jsonl(tmp_path / "a.jsonl", same + lossy)),))
    tokenizer = TokenizerConfig(kind="pretrained", path=str(tmp_path / "tokenizer.json"))
    _, card, _ = prepared(tiny_run([source], tokenizer, validation_share=0.5), tmp_path / "data")
    loaded = JsonTokenizer(LOSSY[kind], END, "")
    changed_texts = [text for text in same + lossy if loaded.decode(loaded.encode(text)) != text]
    assert len(changed_texts) == (40 if kind == "a prefix space" else 10)
    counted = card["tokenizer"]["held_out_documents_not_round_trip"]
    assert 0 < counted <= len(changed_texts)


def test_a_document_of_only_the_end_of_text_is_text():
    tokenizer = JsonTokenizer(changed(byte_level()), END, "")
    document = tokenizer.document(tokenizer.encode(END))
    assert document.count(tokenizer.end_of_text_id) == 1 and tokenizer.decode(document) == END


def test_a_tokenizer_that_cannot_spell_every_text_is_refused_in_words():
    content = {
        "added_tokens": [{"id": 0, "content": END, **ADDED, "special": True}],
        "model": {"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": "[UNK]"},
    }
    with pytest.raises(DataError, match=r"words\.json: this tokenizer cannot encode the text: .*UNK"):
        JsonTokenizer(json.dumps(content), END, "words.json")


@pytest.mark.parametrize("index", [2**31, 2**32 - 1])
def test_ids_that_no_shard_can_store_are_refused(index: int):
    vocab = byte_level()["model"]["vocab"] | {"far": index}
    with pytest.raises(DataError, match="ids go up to"):
        JsonTokenizer(changed(byte_level(), model_vocab=vocab), END, "")
