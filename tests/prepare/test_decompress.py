"""Compressed files give what the libraries that define their formats give, and damage is never silent.

The fuzz test tries 5 forms of compression with 40 damages each, its slow variant with 1,000 each.
"""

import bz2
import gzip
import io
import lzma
import random
import tracemalloc
from collections.abc import Callable

import pyarrow as pa
import pytest
import zstandard

from dsllm.prepare.decompress import DAMAGE, Decompressed

CONTENT = b"".join(str(n * 7919 % 65537).encode() + b"\n" for n in range(20_000))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "lz4": lambda content: pa.compress(content, "lz4", asbytes=True),
}
JUDGE: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
    "zstd": lambda content: pa.CompressedInputStream(io.BytesIO(content), "zstd").read(),
    "lz4": lambda content: pa.CompressedInputStream(io.BytesIO(content), "lz4").read(),
}


def read(content: bytes, compression: str) -> tuple[bytes, int]:
    """The content, and the number of bytes behind it that were ignored."""
    with Decompressed(io.BytesIO(content), compression) as stream:
        return stream.read(), stream.num_trailing_bytes


@pytest.mark.parametrize("compression", COMPRESS)
def test_members_follow_one_another(compression: str):
    compress = COMPRESS[compression]
    for parts in ([CONTENT], [b"", CONTENT[:7], b"", CONTENT[7:], b""], [b""], [b"x"] * 300):
        assert read(b"".join(map(compress, parts)), compression) == (b"".join(parts), 0)


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
@pytest.mark.parametrize("behind", [b"\r\n", b"\n", b"x" * 1_000_000, b"\0" * 5 + b"x"])
def test_bytes_behind_the_data_are_counted(compression: str, behind: bytes):
    content = COMPRESS[compression](CONTENT)
    assert read(content + behind, compression) == (CONTENT, len(behind.lstrip(b"\0")))


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
def test_zeros_behind_the_data_are_padding(compression: str):
    content = COMPRESS[compression](CONTENT)
    assert read(content + bytes(1_000_000), compression) == (CONTENT, 0)
    assert read(content + bytes(12) + content, compression) == (CONTENT * 2, 0)


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_beginning_of_a_further_member_is_damage(compression: str, place: int):
    """gzip itself would take the rest for trailing garbage, and its text would be missing."""
    one, two = COMPRESS[compression](b"one"), bytearray(COMPRESS[compression](b"two"))
    two[place] ^= 1
    with pytest.raises(DAMAGE):
        read(one + bytes(two) + one, compression)
    with pytest.raises(DAMAGE):
        read(one + one[:1], compression)


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESS)
def test_little_is_in_memory_however_much_is_compressed(compression: str):
    bomb = io.BytesIO(COMPRESS[compression](bytes(50_000_000)))
    tracemalloc.start()
    with Decompressed(bomb, compression) as stream:
        assert stream.read(1000) == bytes(1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000  # the window of xz alone has 8 MiB


def damaged(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        case 2:
            return content[:place] + rng.randbytes(20) + content[place + 20 :]
        case 3:
            return content[:place] + content[place + rng.randrange(1, 50) :]
        case _:
            return content + rng.randbytes(rng.randrange(1, 50))


def check_like_the_library(compression: str, num_inputs: int) -> None:
    """Damage gives the library's result; where the library refuses, so do we, or we report bytes behind the data."""
    whole = COMPRESS[compression](CONTENT[:3000]) + COMPRESS[compression](CONTENT[3000:6000])
    rng = random.Random(11)
    for _ in range(num_inputs):
        content = damaged(whole, rng)
        try:
            expected = JUDGE[compression](content)
        except (*DAMAGE, ValueError):
            expected = None
        try:
            found, extra = read(content, compression)
        except DAMAGE:
            assert expected is None or len(expected) < 6000, "the library reads this whole"
            continue
        assert found == expected or (expected is None and extra > 0)
        assert extra > 0 or found == expected


@pytest.mark.parametrize("compression", COMPRESS)
def test_damage_is_judged_as_by_the_library(compression: str):
    check_like_the_library(compression, 40)


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESS)
def test_much_damage_is_judged_as_by_the_library(compression: str):
    check_like_the_library(compression, 1000)
