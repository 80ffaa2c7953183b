"""`dsllm prepare` on finished data says which files are damaged, and writing them again gives the same bytes."""

import dataclasses
from pathlib import Path

import pytest

from dsllm.data.manifest import load_manifest
from dsllm.errors import DataError
from dsllm.prepare.pipeline import prepare
from tests.helpers.preparing import golden_run
from tests.helpers.tiny_job import tree


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare(golden_run(sequence_length=16), directory, print)
    return directory


def flip(path: Path) -> bytes:
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    return content


def test_sound_data_is_verified_and_left_alone(directory: Path):
    before, lines = tree(directory), []
    seen: list[tuple[str, float, float | None]] = []
    manifest = prepare(golden_run(sequence_length=16), directory, lines.append, lambda *words: seen.append(words))
    assert manifest == load_manifest(directory) and tree(directory) == before
    assert len(lines) == 1 and "nothing to do" in lines[0]
    what, done, total = seen[-1]
    assert what == "verifying token shards" and done == pytest.approx(total)


@pytest.mark.parametrize("pattern", ["train-*.bin", "validation-*.bin", "train-*.idx", "tokenizer/tokenizer.json"])
def test_damage_is_named_with_how_to_repair_it(directory: Path, pattern: str):
    path = next(directory.glob(pattern))
    content = flip(path)
    before = tree(directory)
    try:
        with pytest.raises(DataError) as refusal:
            prepare(golden_run(sequence_length=16), directory, print)
        words = str(refusal.value)
        assert "damaged" in words and "dsllm prepare CONFIG --force" in words and tree(directory) == before
        assert (path.name if path.suffix != ".json" else "tokenizer") in words
    finally:
        path.write_bytes(content)


def test_everything_that_is_damaged_is_named_at_once(directory: Path):
    paths = [
        next(directory.glob(pattern)) for pattern in ("train-*.bin", "validation-*.bin", "tokenizer/tokenizer.json")
    ]
    contents = [flip(path) for path in paths]
    try:
        with pytest.raises(DataError) as refusal:
            prepare(golden_run(sequence_length=16), directory, print)
        assert all(
            name in str(refusal.value) for name in (paths[0].name, paths[1].name, "this tokenizer does not match")
        )
    finally:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)


def test_writing_it_again_repairs_it_byte_for_byte(directory: Path):
    """So that a run on it can continue: its checkpoints have the hash of the manifest."""
    before = {path: content for path, (_, content) in tree(directory).items() if "data_card" not in path}
    flip(next(directory.glob("train-*.bin")))
    config = golden_run(sequence_length=16)
    prepare(
        dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=1)), directory, print, force=True
    )
    after = {path: content for path, (_, content) in tree(directory).items() if "data_card" not in path}
    assert after == before
