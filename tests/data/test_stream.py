"""A stream is its shards one after the other, and keeps few of them open."""

from pathlib import Path

import pytest

from dsllm.data.stream import open_streams
from dsllm.errors import DataError
from tests.helpers.prepared import counting_documents, write_prepared, write_shard
from tests.helpers.training_data import at_step, data, training


def test_any_range_is_read_across_any_shards(tmp_path: Path) -> None:
    shards = [counting_documents(length, first=first) for first, length in ((1, 3), (4, 1), (5, 7))]
    manifest = write_prepared(tmp_path, {"a": shards})
    (stream,) = open_streams(tmp_path, [("a", manifest.sources[0].train)])
    assert stream.num_tokens == 11
    for start in range(11):
        for stop in range(start + 1, 12):
            assert stream.read(start, stop).tolist() == list(range(start + 1, stop + 1))


@pytest.mark.parametrize(("length", "blocks"), [(10, 1), (5, 2), (4, 2), (11, 0)])
def test_blocks_share_one_token(tmp_path: Path, length: int, blocks: int) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(11)]})
    (stream,) = open_streams(tmp_path, [("a", manifest.sources[0].train)])
    assert stream.num_blocks(length) == blocks
    for block in range(blocks):
        first = block * length + 1
        assert stream.read_block(block, length).tolist() == list(range(first, first + length + 1))


def test_a_shard_of_another_size_than_the_manifest_says_is_not_read(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(11)]})
    (stream,) = open_streams(tmp_path, [("a", manifest.sources[0].train)])
    write_shard(tmp_path, "train-a-00000", counting_documents(12), 60000)
    with pytest.raises(DataError, match="24 bytes, the manifest says 22"):
        stream.read(0, 1)


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsllm.data.stream.MOST_OPEN_SHARDS", 2)
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("needs /proc")
    shards = [counting_documents(20, first=1 + 20 * i) for i in range(16)]
    manifest = write_prepared(tmp_path, {"a": shards})
    batches = training(tmp_path, manifest, data())
    before = len(list(open_files.iterdir()))
    for step in range(5):
        batches.step(at_step(step))
    assert len(list(open_files.iterdir())) <= before + 2
