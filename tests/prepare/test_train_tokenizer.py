"""Training gives the requested vocabulary, the same one from the same text, and ignores no part of the text."""

import pytest

from dsllm.config.data import TokenizerConfig
from dsllm.data.tokenizer import Tokenizer
from dsllm.errors import DataError
from dsllm.prepare.train_tokenizer import train_tokenizer
from tests.helpers.preparing import GOLDEN

KINDS = ("byte_bpe", "sentencepiece_unigram", "sentencepiece_bpe")
TEXT = GOLDEN.read_text()[:20_000]


def train(kind: str, texts: list[str], vocab_size: int = 400) -> tuple[Tokenizer, list[str]]:
    lines: list[str] = []
    return train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=vocab_size), lines.append), lines


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_has_the_requested_size_and_is_the_same_each_time(kind: str):
    tokenizer, lines = train(kind, [TEXT])
    assert (tokenizer.vocab_size, lines) == (400, [])
    assert tokenizer.model_file() == train(kind, [TEXT])[0].model_file()
    assert tokenizer.model_file() != train(kind, [TEXT[:10_000]])[0].model_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_line_is_used_to_its_end(kind: str):
    """Only the end of a line of 31,000 characters contains '~~', after a NUL; it becomes a token only if it is used."""
    line = TEXT.replace("\n", " ")
    tokenizer, _ = train(kind, [line + line[:10_000] + "\0" + " ~~" * 500], vocab_size=420)
    assert len(tokenizer.encode(" ~~")) == 1


def test_too_little_text_gives_a_smaller_byte_bpe_and_is_refused_by_sentencepiece():
    tokenizer, lines = train("byte_bpe", ["one one two"], vocab_size=1000)
    assert 257 <= tokenizer.vocab_size < 1000
    assert f"{tokenizer.vocab_size} tokens instead of tokenizer.vocab_size 1000" in lines[0]
    with pytest.raises(DataError, match="1000 does not fit the training text: lower it, or give it more text"):
        train("sentencepiece_bpe", ["one one two"], vocab_size=1000)
    with pytest.raises(DataError, match="vocab_size 257 does not fit the training text: raise it"):
        train("sentencepiece_unigram", [TEXT], vocab_size=257)
