"""A file is published completely or not at all, and a lock is held, refused, or reported as impossible."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from dsllm import files
from tests.helpers.flock import UNSUPPORTED, run_with_flock


def test_a_reader_sees_the_old_content_until_the_new_is_published(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_atomically(path, "old")
    files.partial(path).write_text("new")
    assert path.read_text() == "old"
    files.publish(path)
    assert path.read_text() == "new" and not files.partial(path).exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    """The rename fails, because a folder has the file's name."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        files.write_atomically(tmp_path / "taken", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_is_published_by_one_rename(tmp_path: Path):
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "a").write_text("x")
    files.publish_directory(tmp_path / "aside", tmp_path / "final")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["final", "final/a"]


def test_checksums_cover_names_and_contents(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * (files.READ_BYTES + 1))
    assert files.sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    checksums = {files.sha256_of_folder(tmp_path)}
    path.rename(tmp_path / "b")
    checksums.add(files.sha256_of_folder(tmp_path))
    (tmp_path / "b").write_bytes(b"y")
    checksums.add(files.sha256_of_folder(tmp_path))
    (tmp_path / "folder").mkdir()  # folders are not covered
    checksums.add(files.sha256_of_folder(tmp_path))
    assert len(checksums) == 3


def test_a_lock_names_its_holder_and_is_free_once_the_holder_is_killed(tmp_path: Path):
    path = tmp_path / "lock"
    code = (
        f"from dsllm import files; file = open({str(path)!r}, 'a+'); files.hold_lock(file); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        content = path.read_text()
        with path.open("a+") as file, pytest.raises(files.HeldElsewhereError, match=f"process {holder.pid} on"):
            files.hold_lock(file)
        assert path.read_text() == content
        holder.kill()
        holder.wait()
    with path.open("a+") as file:
        files.hold_lock(file)
        assert str(holder.pid) not in path.read_text()


def test_a_file_system_without_locks_is_an_error_that_names_the_file(tmp_path: Path):
    code = f"""
from dsllm import files
with open("{tmp_path}/lock", "a+") as file:
    try:
        files.hold_lock(file)
    except files.LocksUnsupportedError as error:
        print(error)
"""
    assert run_with_flock(UNSUPPORTED, code, tmp_path) == f"{tmp_path}/lock: Function not implemented\n"
