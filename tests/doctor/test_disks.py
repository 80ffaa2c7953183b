"""Folders are tried by a file that is gone afterwards; what does not fit, cannot be written or is another disk is named."""

import dataclasses
import os
import resource
from pathlib import Path

import pytest

from dsllm.byte_units import GIB
from dsllm.doctor.disks import Folder, FolderFacts, check_disks, look_at_marker, marker, try_folder
from tests.doctor.test_findings import places
from tests.helpers.flock import UNSUPPORTED, run_with_flock

SMALL = 2**20
(HERE, THERE) = places("a", "b")


def judge(*seen: FolderFacts, unshared=None, unlocked=None):
    return list(check_disks({HERE: seen}, unshared or {}, unlocked or {}))


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    seen = try_folder(Folder(role="run", path=str(tmp_path)), SMALL)
    assert seen.exists and seen.write > 0 and seen.read > 0 and not seen.problem and not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_yet_is_not_made(tmp_path):
    seen = try_folder(Folder(role="run", path=str(tmp_path / "runs" / "first")), SMALL)
    assert not seen.exists and seen.tested == str(tmp_path) and not seen.problem and not list(tmp_path.iterdir())
    assert not judge(dataclasses.replace(seen, write=1e9, read=1e9))


def test_a_disk_that_is_full_is_an_error(tmp_path):
    """A limit on the size of files stands in for the full disk: the same call fails at the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL // 2, hard))
        seen = try_folder(Folder(role="run", path=str(tmp_path)), SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "did not fit" in seen.problem and not list(tmp_path.iterdir())
    (found,) = judge(seen)
    assert found.level == "error" and found.where == "a" and str(tmp_path) in found.problem


def test_a_folder_that_cannot_be_written_to_is_an_error():
    seen = try_folder(Folder(role="run", path="/proc/dsllm"), SMALL)
    assert seen.problem
    (found,) = judge(seen)
    assert found.level == "error" and "/proc" in found.problem


def test_prepared_data_may_be_read_only(tmp_path):
    data = Folder(role="data", path=str(tmp_path))
    (found,) = judge(dataclasses.replace(try_folder(data, SMALL), write=1e9, read=1e9))
    assert found.level == "advice" and "no manifest" in found.problem
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "tokens.bin").write_bytes(os.urandom(SMALL))
    read_only = FolderFacts(
        folder=data, exists=True, tested=str(tmp_path), problem="Read-only file system", manifest="abc"
    )
    assert not judge(read_only)
    assert try_folder(data, SMALL).manifest


@pytest.mark.parametrize("free, level", [(0.5, "error"), (2.0, "advice"), (3.1, "")])
def test_checkpoints_must_fit(free, level):
    run = Folder(role="run", path="runs/x", needed_bytes=GIB, num_kept=2)
    seen = FolderFacts(folder=run, exists=True, tested=".", free=int(free * GIB), write=1e9, read=1e9)
    assert [found.level for found in judge(seen)] == ([level] if level else [])


def test_slow_disks_are_reported_with_what_they_cost():
    run = Folder(role="run", path="runs/x", needed_bytes=12 * GIB)
    seen = FolderFacts(folder=run, exists=True, tested=".", free=100 * GIB, write=2e7, read=1e7)
    write, read = judge(seen)
    assert "writes 20 MB/s; a checkpoint takes 11 minutes" in write.problem and "reads 10 MB/s" in read.problem
    assert {write.level, read.level} == {"advice"}


def test_hosts_that_see_another_disk_or_other_data_are_named():
    run = FolderFacts(folder=Folder(role="run", path="r"), exists=True, tested=".", free=GIB, write=1e9, read=1e9)
    (found,) = judge(run, unshared={"r": [THERE]})
    assert found.level == "error" and found.where == "rank 1 on b"
    data = dataclasses.replace(run, folder=Folder(role="data", path="d"), manifest="abc")
    (found,) = check_disks({HERE: [data], THERE: [dataclasses.replace(data, manifest="def")]}, {})
    assert found.level == "error" and found.where == "rank 1 on b" and "other data" in found.problem


def test_the_marker_is_there_while_it_is_needed(tmp_path):
    seen = FolderFacts(folder=Folder(role="run", path=str(tmp_path)), exists=True, tested=str(tmp_path))
    with marker(seen) as path:
        assert Path(path).exists()
    assert not list(tmp_path.iterdir())
    with marker(dataclasses.replace(seen, tested="/proc")) as path:
        assert path == ""


def test_locks_that_others_see_or_not(tmp_path):
    """Rank 0's host finds a file system without locks; one that locks for its own host only is found by the others."""
    seen = try_folder(Folder(role="run", path=str(tmp_path)), SMALL)
    with marker(seen) as path:
        assert look_at_marker(path) == "locked"
        assert look_at_marker(str(tmp_path / "absent")) == "unseen" and not (tmp_path / "absent").exists()
    (tmp_path / "file").touch()
    assert look_at_marker(str(tmp_path / "file")) == "unlocked"
    without = (
        "from dsllm.doctor.disks import *\n"
        f"with marker(try_folder(Folder(role='run', path={str(tmp_path)!r}), 1)) as path: print(look_at_marker(path))"
    )
    assert run_with_flock(UNSUPPORTED, without, tmp_path) == "unlocked\n"
    (found,) = judge(unlocked={str(tmp_path): [HERE, THERE]})
    assert found.level == "advice" and f"{tmp_path}: has no locks" in found.problem and "-o flock" in found.action
    (found,) = judge(unlocked={str(tmp_path): [THERE]})
    assert found.level == "advice" and found.where == "rank 1 on b" and "-o localflock" in found.problem
