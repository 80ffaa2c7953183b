"""One process at a time works in a workspace; the others are refused and change nothing in it."""

import errno
import os
from pathlib import Path

import pytest

from dsllm.errors import DataError
from dsllm.prepare.workspace import (
    Workspace,
    check_replaceable,
    not_written,
    open_workspace,
    real_directory,
)
from tests.helpers.flock import REMOVED_FIRST, UNSUPPORTED, run_with_flock


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its inode and time of change."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path):
    with open_workspace(tmp_path / "data", print) as place:
        (place.spool / "train-a-00000.spool").write_text("still needed")
        (place.records / "train-b-00000.json").write_text("finished")
        before = files_in(tmp_path)
        with (
            pytest.raises(DataError, match=rf"data is being prepared already \(process {os.getpid()} on"),
            open_workspace(tmp_path / "data", print),
        ):
            pytest.fail("the lock was given twice")
        assert files_in(tmp_path) == before
    assert not place.lock.exists() and not place.spool.exists() and place.records.is_dir()


def test_a_lock_file_that_its_last_holder_has_just_removed_is_not_enough(tmp_path: Path):
    """A third process would open a new file and lock that: two would be inside."""
    code = f"""
import os
from pathlib import Path
from dsllm.prepare.workspace import open_workspace
with open_workspace(Path("{tmp_path}/data"), print) as place:
    print(f"process {{os.getpid()}} on" in place.lock.read_text())
"""
    assert run_with_flock(REMOVED_FIRST, code, tmp_path) == "True\n"


def test_the_lock_file_of_a_killed_process_is_taken_over(tmp_path: Path):
    place = Workspace(tmp_path / "data", tmp_path / "data.partial")
    place.spool.mkdir(parents=True)
    (place.spool / "train-a-00000.spool").write_text("left behind")
    place.lock.write_text("process 1 on elsewhere")
    with open_workspace(tmp_path / "data", print) as opened:
        assert opened == place
        assert f"process {os.getpid()} on" in place.lock.read_text()
        assert list(place.spool.iterdir()) == []


def test_without_locks_it_warns_and_works(tmp_path: Path):
    code = f"""
from pathlib import Path
from dsllm.prepare.workspace import open_workspace
with open_workspace(Path("{tmp_path}/data"), print) as place:
    print(place.spool.is_dir())
"""
    first, second = run_with_flock(UNSUPPORTED, code, tmp_path).splitlines()
    assert first == (
        f"cannot lock {tmp_path}/data.partial.lock: Function not implemented: "
        f"make sure that no other process prepares {tmp_path}/data"
    )
    assert second == "True"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"data\.directory .*file/data: .* cannot be written"),
        open_workspace(tmp_path / "file" / "data", print),
    ):
        pytest.fail("there is no such folder")


def test_publishing_keeps_the_result_only_and_replaces_prepared_data_only(tmp_path: Path):
    directory = tmp_path / "data"
    for _ in range(2):  # the second one replaces the first
        with open_workspace(directory, print) as place:
            place.tokenizer.mkdir()
            for name in (
                "manifest.json",
                "data_card.json",
                "train-a-00000.bin",
                "train-a-00000.idx",
                "train-a-00001.bin",
            ):
                (place.aside / name).write_text("x")
            place.publish({"train-a-00000"})
        published = ["data_card.json", "manifest.json", "tokenizer", "train-a-00000.bin", "train-a-00000.idx"]
        assert sorted(path.name for path in directory.iterdir()) == published
        assert list(tmp_path.iterdir()) == [directory]
    (directory / "manifest.json").unlink()
    with open_workspace(directory, print) as place, pytest.raises(DataError, match=r"no manifest\.json: copy"):
        place.publish(set())
    assert (directory / "train-a-00000.bin").read_text() == "x"


def test_a_mount_point_cannot_be_replaced():
    with pytest.raises(DataError, match="is a mount point"):
        check_replaceable(Path("/proc"))


def test_other_files_next_to_prepared_data_are_not_removed(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("manifest.json", "train-a-00000.bin", "notes.txt"):
        (tmp_path / "data" / name).write_text("x")
    before = files_in(tmp_path)
    with pytest.raises(DataError, match=r"next to the prepared data \(notes\.txt\): move them away"):
        check_replaceable(tmp_path / "data", force=True)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("name", ["data.partial", "data.replaced"])
def test_a_folder_of_the_user_with_a_name_that_we_need_is_refused(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    before = files_in(tmp_path)
    with (
        pytest.raises(
            DataError, match=rf"{name} contains other files \(thesis\.txt\), but preparing .*/data needs this name"
        ),
        open_workspace(tmp_path / "data", print),
    ):
        pytest.fail("it would be removed")
    assert files_in(tmp_path) == before


def test_a_link_is_followed_and_a_circle_of_links_is_named(tmp_path: Path):
    (tmp_path / "link").symlink_to("scratch")
    assert real_directory(tmp_path / "link") == tmp_path / "scratch"
    assert real_directory(tmp_path / "folder") == tmp_path / "folder"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(DataError, match="leads in a circle"):
        real_directory(tmp_path / "circle")


@pytest.mark.parametrize("name", [".", "..", "inside/..", "../"])
def test_a_folder_around_the_working_directory_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="contains the working directory: name a folder of its own"):
        check_replaceable(real_directory(Path(name)))
    assert real_directory(Path("inside")) == Path("inside")
    assert real_directory(Path("inside/x/..")) == tmp_path / "here" / "inside"


def test_a_path_with_a_zero_byte_is_named():
    with pytest.raises(DataError, match=r"data\.directory a\\x00b is not a path"):
        real_directory(Path("a\0b"))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_not_written(kind: str, tmp_path: Path):
    lock = tmp_path / "data.partial.lock"
    (tmp_path / "precious").write_text("precious")
    {"link": lambda: lock.symlink_to("precious"), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with (
        pytest.raises(DataError, match=r"data\.partial\.lock cannot be written: (Too many|it is a pipe|Is a dir)"),
        open_workspace(tmp_path / "data", print),
    ):
        pytest.fail("the lock is not a file")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "data.partial").exists()


def test_what_was_there_comes_back_if_the_new_content_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "manifest.json").write_text("old")

    def fail(aside: Path, final: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dsllm.files.publish_directory", fail)
    with open_workspace(directory, print) as place:
        (place.aside / "manifest.json").write_text("new")
        with pytest.raises(OSError, match="Input/output"):
            place.publish(set())
    assert (directory / "manifest.json").read_text() == "old" and not place.replaced.exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space and start again"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "Read-only file system; change that, or set another data.directory"),
    ],
)
def test_what_could_not_be_written_is_said_in_words(number: int, words: str):
    error = not_written(Path("data/x"), OSError(number, os.strerror(number), "data/x.partial/a"))
    assert str(error).startswith("data.directory data/x: data/x.partial/a cannot be written: ") and words in str(error)
