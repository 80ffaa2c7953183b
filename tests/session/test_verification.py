"""Damaged token shards end a run in words on every rank, whose losses are otherwise those of a run without verification."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dsllm.checkpoint.find import list_checkpoints
from dsllm.data.manifest import Manifest
from dsllm.engine.processes.process_group import World
from dsllm.errors import DataError
from dsllm.run_directory import DATA_VERIFIED_FILE, read_metrics, read_status
from dsllm.session import verification
from dsllm.session.progress import Progress
from dsllm.session.verification import Verification, open_verification
from tests.helpers.jobs import train
from tests.helpers.prepared import counting_documents, write_prepared
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_job import budget, prepare_folder, tree
from tests.helpers.training_data import G, T, at_step, data, training


def write_data(directory: Path) -> Manifest:
    """Source a of four shards with 16 blocks each, and held-out text."""
    return write_prepared(
        directory,
        {"a": [counting_documents(128, first=128 * i + 1) for i in range(4)]},
        {"a": [counting_documents(40)]},
    )


def damage(directory: Path, prefix: str) -> None:
    path = directory / f"{prefix}.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


def opened(
    world: World, folder: Path, manifest: Manifest, lines: list[str], verify: Any = "background"
) -> Verification:
    config = dataclasses.replace(data(), directory=str(folder / "data"), verify=verify, verify_megabytes_per_second=1.0)
    batches = training(folder / "data", manifest, config, world.data_rank, world.data_size)
    return open_verification(folder / "run", batches, progress_at(0), world, lines.append)


def progress_at(step: int) -> Progress:
    return Progress(step=step, position=at_step(step), tokens=step * G * T, data_sha256="hash")


def verify_all(world: World, folder: Path, manifest: Manifest) -> tuple[set[int], set[int], list[str]]:
    """What is verified at the end of a run, how much of it by this rank, and what it says."""
    lines: list[str] = []
    opening = opened(world, folder, manifest, lines)
    with opening.running() as running:
        running.check_held_out(progress_at(1))
        running.before_save(progress_at(2), last=True)
        assert not running.found_damage
    return opening.verified, set(opening._thread.verified), lines


@pytest.mark.parametrize("world_size", [1, 4])
def test_each_shard_is_verified_once_by_one_rank_over_all_attempts(tmp_path: Path, world_size: int):
    manifest = write_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    found = run_ranks(world_size, verify_all, tmp_path, manifest)
    assert all(verified == set(range(5)) and not lines for verified, _, lines in found)
    own = [number for _, numbers, _ in found for number in numbers]
    assert sorted(own) == [0, 1, 2, 3, 4]
    record = json.loads((tmp_path / "run" / DATA_VERIFIED_FILE).read_text())
    assert record["verified"] == [[0, 5]] and record["damaged"] == [] and record["shards"] == 5
    # the second attempt reads nothing: shards that are gone are not missed
    for path in (tmp_path / "data").glob("*.bin"):
        path.unlink()
    again = run_ranks(world_size, verify_all, tmp_path, manifest)
    assert all(verified == set(range(5)) and not numbers for verified, numbers, _ in again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", '{"format_version": 9}', '{"format_version": 1, "data_sha256": "hash", "shards": 5}',
                '{"format_version": 1, "data_sha256": "other", "shards": 5, "verified": [[0, 5]], "damaged": []}',
                '{"format_version": 1, "data_sha256": "hash", "shards": 5, "verified": [[0]], "damaged": []}',
                '{"format_version": 1, "data_sha256": "hash", "shards": 5, "verified": 7, "damaged": "x"}', "[" * 100_000],
)  # fmt: skip
def test_a_record_that_says_nothing_is_ignored(tmp_path: Path, content: str):
    manifest = write_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / DATA_VERIFIED_FILE).write_text(content)
    ((verified, own, _),) = run_ranks(1, verify_all, tmp_path, manifest)
    assert verified == own == {0, 1, 2, 3, 4}


def find_damage(world: World, folder: Path, manifest: Manifest, verify: str, moment: str) -> str:
    """What the ranks are told where a shard is damaged."""
    with pytest.raises(DataError) as refusal, opened(world, folder, manifest, [], verify).running() as running:
        if moment == "held out":
            running.check_held_out(progress_at(1))
        elif moment == "step":
            running._thread.wait(len(running._thread), 10)  # as a step would
            assert sum(world.gather(running.found_damage)) == 1
            running.refuse(progress_at(3))
        running.before_save(progress_at(4), last=True)
    return str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "verify", "moment", "words"),
    [
        ("train-a-00002", "start", "", "Found before the first step of this attempt. No step has trained on it"),
        ("train-a-00002", "background", "step", "Found after step 3. The run has trained on it since step 1"),
        ("train-a-00003", "background", "end", "Found after step 4. The run has trained on it since step 1"),
        ("validation-a-00000", "background", "held out", "Found before step 1 is evaluated. No step has trained on it"),
    ],
)
def test_damage_found_by_one_rank_ends_all(tmp_path: Path, prefix: str, verify: str, moment: str, words: str):
    manifest = write_data(tmp_path / "data")
    damage(tmp_path / "data", prefix)
    (tmp_path / "run").mkdir()
    before = tree(tmp_path / "data")
    one, two = run_ranks(2, find_damage, tmp_path, manifest, verify, moment)
    assert one == two and words in one and f"{prefix}.bin: its content is not what was prepared" in one
    assert "dsllm prepare CONFIG --force" in one and tree(tmp_path / "data") == before
    record = tmp_path / "run" / DATA_VERIFIED_FILE
    assert record.exists() == (verify == "background"), "before the directory is held nothing is written"
    if verify == "background":
        assert [prefix in problem for _, problem in json.loads(record.read_text())["damaged"]] == [True]
        # the next attempt looks at this shard first
        one, two = run_ranks(2, find_damage, tmp_path, manifest, verify, "")
        assert one == two and "Found before the first step of this attempt" in one


def verify_nothing(world: World, folder: Path, manifest: Manifest) -> bool:
    with opened(world, folder, manifest, [], "off").running() as running:
        running.check_held_out(progress_at(1))
        running.before_save(progress_at(2), last=True)
    return not running.verified and not (folder / "run" / DATA_VERIFIED_FILE).exists()


def test_off_reads_nothing(tmp_path: Path):
    manifest = write_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "data").glob("*.bin"):
        path.write_bytes(path.read_bytes()[::-1])
    assert run_ranks(1, verify_nothing, tmp_path, manifest) == [True]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny run and its data."""
    folder = prepare_folder(tmp_path_factory.mktemp("verified"))
    shutil.rmtree(folder / "runs")
    return folder


def losses(folder: Path) -> list[tuple[float, ...]]:
    rows = read_metrics(folder / "runs" / "tiny")
    return [tuple(row.get(key, 0.0) for key in ("loss", "gradient_norm", "validation_loss")) for row in rows]


@pytest.mark.slow
def test_verification_changes_no_number_and_a_repaired_run_is_the_same(job: Path, tmp_path: Path):
    """Two ranks: without verification, with it, and with a shard that is damaged between two attempts and then repaired."""
    folders = {name: tmp_path / name for name in ("off", "background", "damaged")}
    for folder in folders.values():
        shutil.copytree(job, folder)
    for name in ("off", "background"):
        codes, output = train(folders[name], 2, ["tiny.yaml", f"data.verify={name}"])
        assert codes == [0, 0], output
    assert losses(folders["off"]) == losses(folders["background"])

    folder = folders["damaged"]
    short = ["tiny.yaml", "train.schedule.shape=constant", budget(10)]
    codes, output = train(folder, 2, [*short, "data.verify=off"])
    assert codes == [0, 0], output
    (shard,) = (folder / "data" / "tiny").glob("train-golden-*.bin")
    sound = shard.read_bytes()
    # in the last sequence of the shard, which the step before the resume did not read
    shard.write_bytes(sound[:-40] + bytes([sound[-40] ^ 1]) + sound[-39:])
    before = tree(folder / "runs" / "tiny" / "checkpoints")
    codes, output = train(folder, 2, ["tiny.yaml", "train.schedule.shape=constant"])
    assert codes == [1, 1] and "its content is not what was prepared" in output and "Traceback" not in output, output
    assert tree(folder / "runs" / "tiny" / "checkpoints") == before
    assert read_status(folder / "runs" / "tiny")["state"] == "failed"
    again, output = train(folder, 2, ["tiny.yaml", "train.schedule.shape=constant"])
    assert again == [1, 1] and "Found before the first step of this attempt" in output, output
    shard.write_bytes(sound)
    codes, output = train(folder, 2, ["tiny.yaml", "train.schedule.shape=constant"])
    assert codes == [0, 0] and len(list_checkpoints(folder / "runs" / "tiny" / "checkpoints")) == 2, output
    whole = tmp_path / "whole"
    shutil.copytree(job, whole)
    codes, output = train(whole, 2, ["tiny.yaml", "train.schedule.shape=constant"])
    assert codes == [0, 0] and losses(whole)[10:] == losses(folder)[10:], output


def stop_between_rounds(world: World, folder: Path, manifest: Manifest) -> str:
    """Verify a large shard before the first step, while every rank is asked to stop."""

    def stop() -> None:
        raise DataError("asked to stop")

    config = dataclasses.replace(data(), directory=str(folder / "data"), verify="start")
    batches = training(folder / "data", manifest, config, world.data_rank, world.data_size)
    with pytest.raises(DataError) as caught:
        open_verification(folder / "run", batches, progress_at(0), world, print, stop)
    return str(caught.value)


@pytest.mark.slow
def test_a_long_verification_before_the_first_step_can_be_stopped(tmp_path: Path):
    manifest = write_prepared(tmp_path / "data", {"a": [[[1] * 12_000_000]]})
    began = time.monotonic()
    assert run_ranks(2, stop_at_once, tmp_path, manifest) == ["asked to stop"] * 2
    assert time.monotonic() - began < 60


def stop_at_once(world: World, folder: Path, manifest: Manifest) -> str:
    usual, verification.ROUND_SECONDS = verification.ROUND_SECONDS, 0.01
    try:
        return stop_between_rounds(world, folder, manifest)
    finally:
        verification.ROUND_SECONDS = usual
