"""The baselines equal what xz and gzip reach on the held-out text, and the cross-entropy of its bytes."""

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from dsllm.prepare import baselines
from dsllm.prepare.units import UnitCutter
from tests.helpers.preparing import GOLDEN


def spool(folder: Path, texts: list[bytes], name: str = "s") -> Path:
    cutter = UnitCutter(folder, name, "validation", 10**9)
    for text in texts:
        cutter.add(text, b"")
    return cutter.finish().spool


def test_documents_are_compressed_as_one_text_in_their_order(tmp_path: Path):
    text = GOLDEN.read_bytes()
    spools = [spool(tmp_path, [text[:1000], text[1000:50_000]], "a"), spool(tmp_path, [text[50_000:]], "b")]
    found = baselines.measure_baselines(spools, np.zeros(256, dtype=np.int64))
    assert (found["num_documents"], found["num_bytes"], found["complete"]) == (3, len(text), True)
    assert found["xz_9_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert found["gzip_9_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert found["unigram_bits_per_byte"] == pytest.approx(8)  # nothing was seen in training: all bytes alike


def test_the_unigram_is_an_entropy_where_training_and_held_out_text_are_alike():
    counts = np.zeros(256, dtype=np.int64)
    counts[ord("a")], counts[ord("b")] = 3 * 10**9, 10**9  # so many that one more of each byte does not matter
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert baselines.unigram_bits_per_byte(b"aaab", counts) == pytest.approx(entropy, rel=1e-6)


def test_beyond_the_cap_whole_documents_are_left_out_and_it_says_so(tmp_path: Path):
    spools = [spool(tmp_path, [b"12345678", b"123", b"1"])]
    found = baselines.measure_baselines(spools, np.zeros(256, dtype=np.int64), cap_bytes=10)
    assert (found["num_documents"], found["num_bytes"], found["complete"]) == (1, 8, False)


def test_nothing_held_out_has_no_baselines():
    assert baselines.measure_baselines([], np.zeros(256, dtype=np.int64)) == {}
