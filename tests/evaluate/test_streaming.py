"""Streamed text is, joined, the text of all tokens after the prompt's, whatever the tokenizer does at the start of a text."""

import json
import os
import random
import time
from pathlib import Path

import pytest
from tokenizers import decoders, pre_tokenizers

from dsllm.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.evaluate.streaming import REPLACEMENT, TextStream
from tests.helpers.tokenizer_files import END, HARD, TEXT, byte_level, changed, part, prefixed, sentencepiece_model

BERT = json.dumps(
    {
        "added_tokens": [
            {"id": 0, "content": END, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False}
        ],
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {
                t: i for i, t in enumerate([END, "[UNK]", "the", "river", "##s", "run", "don", "'", "t", ".", "s"])
            },
        },
    }
)


def tokenizer_of(kind: str) -> Tokenizer:
    if kind in ("bpe", "unigram"):
        return SentencePieceTokenizer(sentencepiece_model(kind), END, kind)
    if kind == "bpe-no-prefix":
        return SentencePieceTokenizer(sentencepiece_model("bpe", add_dummy_prefix=False), END, kind)
    metaspace = part(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    contents = {
        "byte_level": changed(byte_level()),
        "prefix_space": changed(byte_level(), pre_tokenizer=part(pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "llama-2": changed(prefixed()),
        "metaspace": changed(
            prefixed(),
            normalizer=None,
            pre_tokenizer=metaspace,
            decoder=part(decoders.Metaspace(prepend_scheme="first")),
        ),
        "wordpiece": BERT,
    }
    return JsonTokenizer(contents[kind], END, kind)


KINDS = ("byte_level", "prefix_space", "llama-2", "metaspace", "wordpiece", "bpe", "bpe-no-prefix", "unigram")


def check(tokenizer: Tokenizer, text: str) -> None:
    """At every place where a prompt could end."""
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[:cut])
        stream = TextStream(tokenizer, ids[:cut])
        pieces = [stream.add(token) for token in ids[cut:]]
        if not before.endswith(REPLACEMENT):  # a prompt is whole characters
            assert before + "".join(pieces) + stream.end() == whole, (text, cut)
            assert REPLACEMENT not in "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_text(kind: str):
    tokenizer = tokenizer_of(kind)
    for text in [*HARD, TEXT[:300], "the rivers run. don't", "🙂🙂🙂", "a\u2581b"]:
        check(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_streamed_without_an_error_in_time_that_does_not_grow(kind: str):
    """2,000 random ids, among them special ones, parts of characters, and ids that the tokenizer does not have."""
    tokenizer, rng = tokenizer_of(kind), random.Random(1)
    stream = TextStream(tokenizer, [tokenizer.end_of_text_id])
    start = time.monotonic()
    pieces = [stream.add(rng.randrange(tokenizer.vocab_size + 50)) for _ in range(2000)]
    pieces += [stream.add(tokenizer.end_of_text_id) for _ in range(2000)]
    assert "".join(pieces) and time.monotonic() - start < 10
    assert len(stream._ids) < 100


def test_a_character_is_shown_once_its_last_byte_is_there():
    tokenizer = JsonTokenizer(changed(byte_level()), END, "")
    stream, ids = TextStream(tokenizer, tokenizer.encode("a")), tokenizer.encode("🙂")
    assert len(ids) == 4 and [stream.add(token) for token in ids] == ["", "", "", "🙂"] and stream.end() == ""
    stream.add(ids[0])
    assert stream.end() == REPLACEMENT


@pytest.mark.skipif(not os.environ.get("DSLLM_TEST_DATA"), reason="DSLLM_TEST_DATA names no folder of real tokenizers")
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gpt2_tokenizer.json", END),
        ("gpt_neox_20B_tokenizer.json", END),
        ("olmo2_dolma2_tokenizer.json", END),
        ("mistral_v1.model", "</s>"),
        ("maxtext_default_sp.model", "</s>"),
    ],
)
def test_published_tokenizers_stream(name: str, end: str):
    tokenizer = load_tokenizer(Path(os.environ["DSLLM_TEST_DATA"]) / "tokenizers" / name, end)
    for text in [*HARD, TEXT[:300]]:
        check(tokenizer, text)
