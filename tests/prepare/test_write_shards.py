"""Long texts are cut without changing what is encoded."""

import random

import pytest

from dsllm.config.data import TokenizerConfig
from dsllm.prepare import write_shards
from dsllm.prepare.train_tokenizer import train_tokenizer
from tests.helpers.preparing import GOLDEN


@pytest.mark.parametrize("alphabet", ["ab\n ", "ab\n\n", "ab", "\n", "a \n\té"])
def test_the_parts_of_a_text_are_short_and_make_it_up(alphabet: str):
    text = "".join(random.Random(1).choices(alphabet, k=1000))
    parts = list(write_shards.cut(text, 50))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 50 for part in parts)


def test_a_text_cut_at_line_ends_has_the_tokens_of_the_whole():
    text = GOLDEN.read_text()[:20_000]
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=400), lambda line: None)
    whole = tokenizer.encode(text)
    assert write_shards.encode_documents(tokenizer, [text, "", "short"], limit=1000) == [
        whole,
        [],
        tokenizer.encode("short"),
    ]


def test_documents_are_batched_in_order_and_within_bounds():
    texts = ["aaaa", "bbbb", "cccc", "d" * 30, "e"]
    found = list(write_shards.batches((text.encode() for text in texts), limit=10))
    assert found == [["aaaa", "bbbb"], ["cccc"], ["d" * 30], ["e"]]
