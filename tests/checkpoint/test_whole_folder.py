"""A folder is complete or not there, after a kill at any file operation too; what was there before is never lost."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dsllm.checkpoint.whole_folder import whole_folder
from dsllm.errors import CheckpointError

LAST = "config.json"
FILES = ("a.safetensors", "b.safetensors", LAST)
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "open")


def write(path: Path, content: str, replace: bool = False, fail: Exception | None = None) -> None:
    with whole_folder(path, LAST, lambda name: name in FILES, replace) as aside:
        for name in FILES:
            (aside / name).write_text(content)
            if fail is not None and name != FILES[0]:
                raise fail


def content(folder: Path) -> set[str] | None:
    """What all files of a complete folder contain; None: it is not there, or not complete."""
    if not (folder / LAST).is_file():
        return None
    assert {path.name for path in folder.iterdir()} >= {*FILES}
    return {(folder / name).read_text() for name in FILES}


def killed_at(number: int, folder: Path, call: Callable[[], None]) -> bool:
    """Run a call in another process that dies at its `number`-th file operation in a folder; False: it ended before."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in OPERATIONS and str(folder) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        call()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def make_new(folder: Path) -> None:
    folder.parent.mkdir()


def make_empty(folder: Path) -> None:
    folder.mkdir(parents=True)


def make_old(folder: Path) -> None:
    folder.parent.mkdir()
    write(folder, "old")


def make_old_twice(folder: Path) -> None:
    """As a process leaves it that was killed after the new folder was in its place."""
    make_old(folder)
    shutil.copytree(folder, folder.with_name(f".{folder.name}.replaced"))


@pytest.mark.slow
@pytest.mark.parametrize("before", [make_new, make_empty, make_old, make_old_twice])
def test_a_kill_at_any_operation_loses_nothing_and_does_not_block_the_next(before, tmp_path: Path):
    number = 0
    killed = True
    while killed:
        number += 1
        folder = tmp_path / str(number) / "hf"
        before(folder)
        killed = killed_at(number, tmp_path, partial(write, folder, "new", replace=True))
        there, away = content(folder), content(folder.with_name(".hf.replaced"))
        assert there in (None, {"old"}, {"new"}) and away in (None, {"old"})
        if before in (make_old, make_old_twice):
            assert there is not None or away == {"old"}
        write(folder, "next", replace=True)
        assert content(folder) == {"next"}
        assert [path.name for path in folder.parent.iterdir()] == ["hf"]
        assert len(list(folder.iterdir())) == len(FILES)
    assert number > 10  # operations


@pytest.mark.parametrize("before", [make_new, make_empty, make_old])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("odd")])
def test_an_error_leaves_what_was_there(before, error: Exception, tmp_path: Path):
    folder = tmp_path / "models" / "hf"
    before(folder)
    expected = (folder.is_dir(), content(folder))
    with pytest.raises((CheckpointError, ValueError), match=r"No space left|odd"):
        write(folder, "new", replace=True, fail=error)
    assert (folder.is_dir(), content(folder)) == expected
    assert [path.name for path in folder.parent.iterdir()] == (["hf"] if folder.is_dir() else [])
    assert not folder.is_dir() or len(list(folder.iterdir())) in (0, len(FILES))


def test_a_link_to_an_empty_folder_is_followed_and_stays(tmp_path: Path):
    (tmp_path / "disk" / "hf").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "hf")
    write(tmp_path / "link", "one")
    write(tmp_path / "link", "two", replace=True)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "disk" / "hf") == {"two"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["disk", "hf", "link", *FILES])


def test_a_link_to_a_folder_that_is_not_there_makes_it(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "hf")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "disk" / "hf") == {"one"}


def test_the_working_directory_is_filled_and_keeps_its_permissions(tmp_path: Path, monkeypatch):
    (tmp_path / "hf").mkdir(mode=0o2750)
    inode = (tmp_path / "hf").stat().st_ino
    monkeypatch.chdir(tmp_path / "hf")
    write(Path(), "one")
    assert content(tmp_path / "hf") == {"one"} and (tmp_path / "hf").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("other", ["README.md", ".git/config", "data.bin"])
def test_a_folder_with_anything_else_in_it_is_left_alone(other: str, replace: bool, tmp_path: Path):
    write(tmp_path / "hf", "old")
    (tmp_path / "hf" / other).parent.mkdir(exist_ok=True)
    (tmp_path / "hf" / other).write_text("precious")
    with pytest.raises(CheckpointError, match=other.partition("/")[0] if replace else "give --replace"):
        write(tmp_path / "hf", "new", replace)
    assert content(tmp_path / "hf") == {"old"} and (tmp_path / "hf" / other).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_is_not_a_folder_to_write_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        ("/", "root of the file system"),
        (tmp_path / "file", "is a file"),
        ("/proc/x", "could not be written"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write(Path(path), "new", replace=True)
    with pytest.raises(CheckpointError):
        write(tmp_path / "loop", "new", replace=True)
    assert (tmp_path / "file").read_text() == "precious" and (tmp_path / "loop").is_symlink()


def test_two_that_write_the_same_folder_do_not_mix(tmp_path: Path):
    for folder in (tmp_path / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with whole_folder(folder, LAST, FILES.__contains__, False) as aside:
            with pytest.raises(CheckpointError, match="another process is writing it"):
                write(folder, "second")
            for name in FILES:
                (aside / name).write_text("first")
        assert content(folder) == {"first"}
