"""Changed content of a shard is found by its recorded hash, at once or slowly in a thread that ends with its block."""

import dataclasses
import random
import threading
import time
from pathlib import Path

import pytest

from dsllm.data.manifest import Manifest, check_shards
from dsllm.data.verify import BackgroundVerification, check_content, check_held_out, hashed_shards, num_without_hash
from dsllm.errors import DataError
from tests.helpers.damage import DAMAGE
from tests.helpers.prepared import counting_documents, write_prepared


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Sources of three and one training shards, the first with one of held-out text."""
    return write_prepared(
        tmp_path, {"a": [counting_documents(400)] * 3, "b": [counting_documents(300)]}, {"a": [counting_documents(90)]}
    )


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_each_shard_is_listed_once_with_what_was_recorded(tmp_path: Path, manifest: Manifest):
    shards = hashed_shards(manifest)
    assert [shard.number for shard in shards] == [0, 1, 2, 3, 4]
    assert [shard.prefix for shard in shards if shard.held_out] == ["validation-a-00000"]
    assert all(shard.num_bytes == (tmp_path / f"{shard.prefix}.bin").stat().st_size for shard in shards)
    read: list[int] = []
    check_content(tmp_path, shards, read.append)
    assert sum(read) == sum(shard.num_bytes for shard in shards) and num_without_hash(manifest) == 0


def test_adopted_shards_have_no_hash_and_are_left_out(manifest: Manifest):
    source = manifest.sources[0]
    first = dataclasses.replace(source.train[0], bin_sha256=None)
    source = dataclasses.replace(source, train=(first, *source.train[1:]))
    manifest = dataclasses.replace(manifest, sources=(source, manifest.sources[1]))
    assert [shard.number for shard in hashed_shards(manifest)] == [1, 2, 3, 4] and num_without_hash(manifest) == 1


def test_any_flipped_bit_of_any_shard_is_found(tmp_path: Path, manifest: Manifest):
    """100 of them, at random places; sizes, headers and ids stay valid, so nothing else could find them."""
    shards, source = hashed_shards(manifest), random.Random(3)
    for _ in range(100):
        shard = source.choice(shards)
        path = tmp_path / f"{shard.prefix}.bin"
        bit = source.randrange(8 * shard.num_bytes)
        flip(path, bit)
        check_shards(tmp_path, manifest)
        with pytest.raises(DataError) as refusal:
            check_content(tmp_path, shards)
        assert str(path) in str(refusal.value)
        assert sum(other.prefix in str(refusal.value) for other in shards) == 1
        flip(path, bit)
    check_content(tmp_path, shards)


@pytest.mark.parametrize("kind", ["absent", "fifo", "folder", "device"])
def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path, manifest: Manifest, kind: str):
    path = tmp_path / "train-b-00000.bin"
    DAMAGE[kind](path, random.Random(0))
    with pytest.raises(DataError, match=str(path)):
        check_content(tmp_path, hashed_shards(manifest))


def test_a_thread_verifies_shards_in_order(tmp_path: Path, manifest: Manifest):
    shards = hashed_shards(manifest)
    flip(tmp_path / "train-a-00001.bin", 7)
    (tmp_path / "train-b-00000.bin").unlink()
    with BackgroundVerification(tmp_path, shards, 1e9) as verification:
        verification.wait(len(shards), 10)
        assert verification.has_done(5) and verification.num_done == 5
    assert verification.verified == [0, 2, 3] and list(verification.problems) == [1]
    assert "its content is not what was prepared" in verification.problems[1]
    assert "cannot be read: No such file" in verification.unread[4]


def big_shard(directory: Path, num_bytes: int) -> Manifest:
    return write_prepared(directory, {"a": [[[1] * (num_bytes // 2)]]})


def test_the_rate_is_bounded_until_somebody_waits(tmp_path: Path):
    manifest = big_shard(tmp_path, 8 * 2**20)
    shards = hashed_shards(manifest)
    with BackgroundVerification(tmp_path, shards, 2**20) as verification:  # takes eight seconds
        time.sleep(0.5)
        assert verification.num_done == 0
        began = time.monotonic()
        verification.wait(1, 20)
        assert verification.verified == [0] and time.monotonic() - began < 4


def test_the_thread_ends_with_its_block(tmp_path: Path):
    manifest = big_shard(tmp_path, 4 * 2**20)
    began = time.monotonic()
    with BackgroundVerification(tmp_path, hashed_shards(manifest), 1000.0):
        assert any(thread.name == "verify-data" for thread in threading.enumerate())
    assert not any(thread.name == "verify-data" for thread in threading.enumerate())
    assert time.monotonic() - began < 5


def test_nothing_to_verify_starts_no_thread(tmp_path: Path):
    with BackgroundVerification(tmp_path, [], 1.0) as verification:
        assert not any(thread.name == "verify-data" for thread in threading.enumerate())
        verification.wait(0, 10)
        assert verification.has_done(0) and len(verification) == 0


def test_held_out_shards_are_checked_alone(tmp_path: Path, manifest: Manifest):
    lines: list[str] = []
    flip(tmp_path / "train-a-00001.bin", 7)
    check_held_out(tmp_path, manifest, lines.append)
    flip(tmp_path / "validation-a-00000.bin", 7)
    with pytest.raises(DataError, match=r"(?s)validation-a-00000.*dsllm prepare CONFIG --force"):
        check_held_out(tmp_path, manifest, lines.append)
    assert lines == []
    source = manifest.sources[0]
    adopted = dataclasses.replace(source, validation=(dataclasses.replace(source.validation[0], bin_sha256=None),))
    check_held_out(tmp_path, dataclasses.replace(manifest, sources=(adopted,)), lines.append)
    assert len(lines) == 1 and "is not verified" in lines[0]
