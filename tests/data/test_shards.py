"""Shards are Megatron's own, whole or absent, and a damaged one is named before training reads it."""

import hashlib
import json
import os
import resource
import signal
import struct
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dsllm.data.shards import HEADER, Shard, ShardWriter, bin_path, idx_path, shard_dtype
from dsllm.errors import DataError
from tests.helpers.damage import NO_FILES, put_in_place

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
DATA = os.environ.get("DSLLM_TEST_DATA")
GOLDEN = ["c4_gpt2_int32", "c4_gpt2_uint16_multiseq"]


def written(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: type = np.uint16) -> Shard:
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
    return Shard(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: type) -> None:
    shard = written(tmp_path / "s", dtype=dtype)
    stream = [token for document in DOCUMENTS for token in document]
    assert shard.read(0, shard.num_tokens).tolist() == stream
    assert shard.read(2, 7).tolist() == stream[2:7]
    assert shard.read(3, 3).tolist() == []
    assert (shard.num_tokens, shard.num_documents, shard.dtype) == (len(stream), len(DOCUMENTS), np.dtype(dtype))
    assert shard.document_offsets.tolist() == [0, 3, 4, 9, 11]


def test_the_writer_says_what_it_wrote(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", np.dtype(np.uint16))
    for document in DOCUMENTS:
        writer.add_document(np.array(document))
    info = writer.close()
    content = bin_path(tmp_path / "s").read_bytes()
    assert info.num_tokens == 11 and info.num_documents == 4
    assert (info.bin_bytes, info.idx_bytes) == (len(content), idx_path(tmp_path / "s").stat().st_size)
    assert info.bin_sha256 == hashlib.sha256(content).hexdigest()
    assert writer.close() == info


def test_the_type_follows_megatrons_rule() -> None:
    assert [shard_dtype(size).name for size in (256, 65499, 65500, 10**6)] == ["uint16", "uint16", "int32", "int32"]


def test_a_shard_without_documents_is_a_shard(tmp_path: Path) -> None:
    shard = written(tmp_path / "s", [])
    assert (shard.num_tokens, shard.num_documents, shard.document_offsets.tolist()) == (0, 0, [0])


def test_a_prefix_may_have_dots(tmp_path: Path) -> None:
    assert written(tmp_path / "en.v2").num_tokens == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["en.v2.bin", "en.v2.idx"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "s", np.dtype(np.uint16)) as writer:
        writer.add_document([1])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 65536])
def test_an_id_that_does_not_fit_is_refused_and_not_wrapped(tmp_path: Path, token: int) -> None:
    with (
        pytest.raises(DataError, match="do not fit uint16"),
        ShardWriter(tmp_path / "s", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document([1, token])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails writes as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DataError, match="could not be written"):
            written(tmp_path / "s", [[7] * 5000] * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_may_be_written_over(tmp_path: Path) -> None:
    written(tmp_path / "s", [[1] * 100])
    assert written(tmp_path / "s").num_tokens == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def test_a_truncated_shard_is_refused_with_its_name_and_sizes(tmp_path: Path) -> None:
    written(tmp_path / "s")
    cut(bin_path(tmp_path / "s"), 20)
    with pytest.raises(DataError, match=r"s\.bin: 20 bytes, but s\.idx describes 22"):
        Shard(tmp_path / "s")


@pytest.mark.parametrize(
    ("num_bytes", "message"), [(5, "not a Megatron"), (20, "shorter than its header"), (40, "truncated")]
)
def test_a_truncated_index_is_refused(tmp_path: Path, num_bytes: int, message: str) -> None:
    written(tmp_path / "s")
    cut(idx_path(tmp_path / "s"), num_bytes)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "s")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX\x00\x00\x00", "not a Megatron .idx"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "float32"),
        (17, b"\x09", "code 9"),
        (17, b"\x04", "truncated, or not the pair of this .idx"),  # int32 over a .bin of uint16
        (18, struct.pack("<Q", 2**60), "truncated"),
        (18, struct.pack("<Q", 3), "longer than its header says"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    written(tmp_path / "s")
    content = bytearray(idx_path(tmp_path / "s").read_bytes())
    content[offset : offset + len(value)] = value
    idx_path(tmp_path / "s").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "s")


@pytest.mark.parametrize("path_of", [bin_path, idx_path])
def test_a_missing_half_is_named(tmp_path: Path, path_of: type) -> None:
    written(tmp_path / "s")
    path_of(tmp_path / "s").unlink()
    with pytest.raises(DataError, match=path_of(tmp_path / "s").name):
        Shard(tmp_path / "s")


def test_a_file_that_is_cut_under_a_running_job_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    shard = written(tmp_path / "s")
    os.truncate(bin_path(tmp_path / "s"), 10)
    with pytest.raises(DataError, match="ends at token 5, but had 11"):
        shard.read(3, 8)


def test_opening_takes_no_longer_for_a_large_shard(tmp_path: Path) -> None:
    """A shard of 10^11 tokens, all holes but its last entry: opened and read at its end without reading the rest."""
    num_documents, num_tokens = 10**8, 10**11
    length = num_tokens // num_documents
    with idx_path(tmp_path / "s").open("wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1))
        file.seek(HEADER.size + 4 * (num_documents - 1))
        file.write(struct.pack("<i", length))
        file.seek(HEADER.size + 12 * num_documents - 8)
        file.write(struct.pack("<q", 2 * (num_tokens - length)))
        file.truncate(HEADER.size + 20 * num_documents + 8)
    try:
        with bin_path(tmp_path / "s").open("wb") as file:
            file.truncate(2 * num_tokens)
    except OSError:
        pytest.skip("this file system has no file of 200 GB")
    shard = Shard(tmp_path / "s")
    assert shard.num_tokens == num_tokens
    assert shard.read(num_tokens - 3, num_tokens).tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about every GPU library that is not there
        return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.slow  # importing megatron-core takes seconds
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatrons_reader_reads_ours(tmp_path: Path, megatron: ModuleType, dtype: type) -> None:
    written(tmp_path / "s", dtype=dtype)
    dataset = megatron.IndexedDataset(str(tmp_path / "s"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset[0].dtype == dtype


@pytest.mark.slow
def test_our_files_are_megatrons_byte_for_byte(tmp_path: Path, megatron: ModuleType) -> None:
    written(tmp_path / "ours")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for half in ("bin", "idx"):
        assert (tmp_path / f"ours.{half}").read_bytes() == (tmp_path / f"theirs.{half}").read_bytes()


@pytest.mark.slow
def test_we_read_megatrons_documents_of_several_sequences(tmp_path: Path, megatron: ModuleType) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.int32)
    builder.add_document(np.arange(10), [4, 6])
    builder.add_document(np.arange(5), [5])
    builder.finalize(str(tmp_path / "s.idx"))
    shard = Shard(tmp_path / "s")
    assert shard.num_documents == 2
    assert shard.document_offsets.tolist() == [0, 10, 15]
    assert shard.read(8, 12).tolist() == [8, 9, 0, 1]


@pytest.mark.parametrize("name", GOLDEN)
def test_we_read_the_golden_files_of_megatron(name: str) -> None:
    folder = Path(DATA or "", "megatron")
    if DATA is None or not (folder / f"{name}.idx").exists():
        pytest.skip(f"{name}: DSLLM_TEST_DATA names no folder with it")
    records = json.loads((folder / "expected.json").read_text())
    expected = next(record for record in records if record["name"] == name)
    shard = Shard(folder / name)
    assert (shard.num_tokens, shard.num_documents) == (expected["tokens"], expected["documents"])
    assert shard.dtype.name == expected["dtype"]
    starts = shard.document_offsets[:2].tolist()
    assert [shard.read(s, s + 16).tolist() for s in starts] == expected["first_two_docs_first16"]
    assert shard.document_offsets[-1] == shard.num_tokens


@pytest.mark.parametrize("path_of", [bin_path, idx_path])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_and_not_opened(tmp_path: Path, path_of: type, kind: str) -> None:
    written(tmp_path / "s")
    path = path_of(tmp_path / "s")
    put_in_place(path, kind)
    with pytest.raises(DataError, match=path.name):
        Shard(tmp_path / "s")


def test_overflowed_offsets_are_named(tmp_path: Path) -> None:
    """The last offset of a .bin of more than 2 GiB, where it was computed in 32 bits."""
    prefix = tmp_path / "s"
    lengths = [2**28, 2**28, 5]
    with bin_path(prefix).open("wb") as file:
        file.truncate(4 * sum(lengths))
    offsets = [0, 2**30, 2**31 - 2**32]
    content = HEADER.pack(b"MMIDIDX\x00\x00", 1, 4, 3, 4) + struct.pack("<3i", *lengths) + struct.pack("<3q", *offsets)
    idx_path(prefix).write_bytes(content + struct.pack("<4q", *range(4)))
    with pytest.raises(DataError, match=r"s\.idx: the last offset says .*overflowed 32 bits.*write the \.idx again"):
        Shard(prefix)
