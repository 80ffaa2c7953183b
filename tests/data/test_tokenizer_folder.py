"""Only the hashed files of a tokenizer reach a run's directory, whatever else a foreign folder contains or links to."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsllm.data.manifest import check_tokenizer, load_manifest, write_manifest
from dsllm.data.tokenizer_folder import check_same, copy_tokenizer, hash_of_tokenizer, tokenizer_files
from dsllm.errors import DataError
from dsllm.files import sha256_of_folder
from tests.helpers.prepared import counting_documents, write_prepared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "info.json").write_text("{}")
    return folder


def test_the_hash_is_that_of_its_files(folder: Path):
    assert [path.name for path in tokenizer_files(folder)] == ["info.json", "tokenizer.json"]
    assert hash_of_tokenizer(folder) == sha256_of_folder(folder)


def secret(folder: Path) -> Path:
    """A folder that is nobody's business."""
    path = folder.parent / "secret"
    path.mkdir()
    (path / "id_rsa").write_text("key")
    return path


def replaced(folder: Path, by: Callable[[Path], object]) -> None:
    shutil.rmtree(folder)
    by(folder)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "link to a folder": lambda folder: (folder / "more").symlink_to(secret(folder)),
    "link to a file": lambda folder: (folder / "vocab.json").symlink_to(secret(folder) / "id_rsa"),
    "link to nothing": lambda folder: (folder / "vocab.json").symlink_to(folder / "absent"),
    "a link itself": lambda folder: replaced(folder, lambda path: path.symlink_to(secret(folder))),
    "folder": lambda folder: (folder / "more").mkdir(),
    "fifo": lambda folder: os.mkfifo(folder / "fifo"),
    "device": lambda folder: (folder / "zero").symlink_to("/dev/zero"),
    "huge": lambda folder: os.truncate(folder / "tokenizer.json", 2**40),
    "empty": lambda folder: replaced(folder, Path.mkdir),
    "absent": lambda folder: replaced(folder, str),
    "file": lambda folder: replaced(folder, Path.touch),
}
"""What nobody should read."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_folders_are_refused_and_nothing_is_copied(folder: Path, tmp_path: Path, kind: str):
    sha256 = sha256_of_folder(folder)
    FOREIGN[kind](folder)
    for use in (
        lambda: hash_of_tokenizer(folder),
        lambda: check_same(folder, None),
        lambda: copy_tokenizer(folder, tmp_path / "run", sha256),
    ):
        with pytest.raises(DataError, match="tokenizer"):
            use()
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


def test_the_files_are_copied_and_only_they(folder: Path, tmp_path: Path):
    target, sha256 = tmp_path / "run" / "tokenizer", sha256_of_folder(folder)
    target.parent.mkdir()
    copy_tokenizer(folder, target, sha256)
    assert sha256_of_folder(target) == sha256
    times = [path.stat().st_mtime_ns for path in sorted(target.iterdir())]
    copy_tokenizer(folder, target, sha256)
    assert [path.stat().st_mtime_ns for path in sorted(target.iterdir())] == times, "a good copy is left alone"
    (target / "tokenizer.json").write_text("damaged")
    (target / "more.json").write_text("{}")
    copy_tokenizer(folder, target, sha256)
    assert sorted(path.name for path in target.iterdir()) == ["info.json", "tokenizer.json"]
    assert sha256_of_folder(target) == sha256 and [path.name for path in target.parent.iterdir()] == ["tokenizer"]


def test_a_link_in_the_place_of_the_copy_is_not_followed(folder: Path, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("x")
    target = tmp_path / "run"
    target.symlink_to(kept)
    copy_tokenizer(folder, target, sha256_of_folder(folder))
    assert not target.is_symlink() and [path.name for path in kept.iterdir()] == ["mine.txt"]


def test_a_source_that_has_changed_is_refused_and_the_old_copy_stays(folder: Path, tmp_path: Path):
    target, sha256 = tmp_path / "run", sha256_of_folder(folder)
    copy_tokenizer(folder, target, sha256)
    (folder / "tokenizer.json").write_text("{}")
    (target / "info.json").write_text("[]")
    before = sha256_of_folder(target)
    with pytest.raises(DataError, match="has changed since it was checked"):
        copy_tokenizer(folder, target, sha256)
    assert sha256_of_folder(target) == before


def test_a_copy_must_have_the_recorded_hash(folder: Path):
    sha256 = sha256_of_folder(folder)
    check_same(folder, sha256)
    check_same(folder, None)
    (folder / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(DataError, match="is not the tokenizer that the model was trained with"):
        check_same(folder, sha256)


@pytest.mark.parametrize("kind", FOREIGN)
def test_prepared_data_with_such_a_tokenizer_is_refused(tmp_path: Path, kind: str):
    """Also where its manifest has the hash of nothing, which is that of a folder without files."""
    write_prepared(tmp_path / "data", {"a": [counting_documents(100)]})
    manifest = load_manifest(tmp_path / "data")
    check_tokenizer(tmp_path / "data", manifest)
    write_manifest(tmp_path / "data", manifest)
    FOREIGN[kind](tmp_path / "data" / "tokenizer")
    with pytest.raises(DataError, match="tokenizer"):
        check_tokenizer(tmp_path / "data", load_manifest(tmp_path / "data"))
