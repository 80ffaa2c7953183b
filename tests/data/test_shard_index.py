"""An .idx that does not describe its .bin from the first token to the last is refused with what is wrong."""

import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dsllm.data import shard_index
from dsllm.data.shards import HEADER, MAGIC, Shard, bin_path, idx_path
from dsllm.errors import DataError


def write(
    prefix: Path,
    lengths: Sequence[int] = (3, 1, 5, 2),
    offsets: Sequence[int] | None = None,
    documents: Sequence[int] | None = None,
    num_tokens: int | None = None,
) -> Path:
    """A shard of int32 ids 0, 1, 2, ... with these entries; what is not given is right."""
    ends = np.cumsum(lengths)
    offsets = [4 * int(end - length) for end, length in zip(ends, lengths, strict=True)] if offsets is None else offsets
    documents = range(len(lengths) + 1) if documents is None else documents
    np.arange(int(ends[-1]) if num_tokens is None else num_tokens, dtype="<i4").tofile(bin_path(prefix))
    content = HEADER.pack(MAGIC, 1, 4, len(lengths), len(documents))
    content += np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes()
    idx_path(prefix).write_bytes(content + np.array(documents, "<i8").tobytes())
    return prefix


def refusal(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        Shard(prefix).check_index()
    assert str(prefix) in str(caught.value)
    with pytest.raises(DataError):
        assert Shard(prefix).document_offsets is None
    return str(caught.value)


@pytest.mark.parametrize(
    "documents", [None, [0, 4], [0, 0, 1, 1, 4, 4], [0, 2, 4]], ids=["each", "one", "empty ones", "several sequences"]
)
@pytest.mark.parametrize("part", [1, 2, 3, 2**20])
def test_a_sound_index_passes(tmp_path: Path, documents: list[int] | None, part: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_index, "_PART", part)
    shard = Shard(write(tmp_path / "s", documents=documents))
    shard.check_index()
    assert shard.document_offsets[-1] == 11 and shard.document_offsets[0] == 0


def test_a_sequence_may_be_empty(tmp_path: Path):
    shard = Shard(write(tmp_path / "s", [0, 3, 0, 2]))
    assert shard.document_offsets.tolist() == [0, 0, 3, 3, 5]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offsets": [0, 12, 16 - 2**32, 36]}, "sequence 2 of 4 begins at byte .*overflowed 32 bits"),
        ({"offsets": [0, 12, 16 + 2**32, 36]}, "overflowed 32 bits"),
        ({"offsets": [0, 12, 16, 36 - 2**32]}, "overflowed 32 bits.*write the .idx again"),
        (
            {"offsets": [4, 16, 20, 40], "num_tokens": 12},
            "sequence 0 of 4 begins at byte 4.*leaves parts of its .bin out",
        ),
        (
            {"offsets": [0, 12, 24, 44], "num_tokens": 13},
            "sequence 2 of 4 begins at byte 24.*leaves parts of its .bin out",
        ),
        ({"offsets": [20, 0, 16, 36]}, "leaves parts of its .bin out, or has them in another order"),
        ({"lengths": [3, -1, 7, 2], "offsets": [0, 12, 8, 36]}, "sequence 1 of 4 has the length -1"),
        ({"documents": [0, 1, 2, 3, 10**9]}, "document 4 of 4 starts at sequence 1000000000 of 4"),
        ({"documents": [0, 1, -2, 3, 4]}, "document 2 of 4 starts at sequence -2"),
        ({"documents": [0, 3, 2, 3, 4]}, "document 2 of 4 starts at sequence 2"),
        ({"documents": [1, 2, 3, 4]}, "document 0 of 3 starts at sequence 1"),
        ({"documents": [0, 1, 2]}, "its documents end at sequence 2 of 4"),
        ({"documents": [0]}, "its documents end at sequence 0 of 4"),
        ({"documents": []}, "has no document starts"),
    ],
)
@pytest.mark.parametrize("part", [1, 3, 2**20])
def test_what_does_not_describe_the_whole_bin_is_refused(
    tmp_path: Path, entries: dict, words: str, part: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shard_index, "_PART", part)
    prefix = write(tmp_path / "s", **entries)
    with pytest.raises(DataError, match=words):
        Shard(prefix).check_index()
    refusal(prefix)


def test_a_single_damaged_entry_is_found_wherever_it_is(tmp_path: Path):
    """Each of 300 damaged copies has one entry changed by a flipped bit; a document start may stay a possible one."""
    source = random.Random(2)
    lengths = [source.randrange(1, 9) for _ in range(40)]
    prefix = write(tmp_path / "s", lengths)
    content = idx_path(prefix).read_bytes()
    for _ in range(300):
        at = source.randrange(8 * HEADER.size, 8 * (HEADER.size + 12 * 40))
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        idx_path(prefix).write_bytes(damaged)
        refusal(prefix)


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_damage_is_a_named_error_or_a_right_result(tmp_path: Path, count: int):
    """Cut, overwritten and extended indexes: what opens and passes describes the same tokens."""
    source = random.Random(4)
    prefix = write(tmp_path / "s", [source.randrange(1, 9) for _ in range(12)])
    content, tokens = idx_path(prefix).read_bytes(), bin_path(prefix).read_bytes()
    for _ in range(count):
        damaged = bytearray(content)
        kind = source.randrange(5)
        if kind == 0:
            damaged = damaged[: source.randrange(len(damaged))]
        elif kind == 1:
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        elif kind == 2:
            at = source.randrange(len(damaged) - 8)
            damaged[at : at + 8] = struct.pack("<q", source.choice([0, -1, 2**31, 2**60, 2**63 - 1, -(2**63)]))
        elif kind == 3:
            damaged += bytes(source.randrange(1, 40))
        else:
            at = source.randrange(len(damaged))
            del damaged[at : at + 8]
        idx_path(prefix).write_bytes(damaged)
        try:
            shard = Shard(prefix)
            shard.check_index()
            assert shard.document_offsets[-1] == shard.num_tokens
        except DataError as error:
            assert str(prefix) in str(error)
    assert bin_path(prefix).read_bytes() == tokens


def test_a_million_sequences_take_less_than_a_second(tmp_path: Path):
    prefix = write(tmp_path / "s", np.ones(10**6, dtype=np.int64))
    began = time.monotonic()
    Shard(prefix).check_index()
    assert time.monotonic() - began < 1
