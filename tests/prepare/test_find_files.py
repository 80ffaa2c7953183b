"""A source's paths give each file once, in order; what is passed over is counted, and nothing to read is an error."""

import os
from pathlib import Path

import pytest

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.find_files import find_files


def names(source_paths: list[Path | str]) -> list[str]:
    return [path.name for path in find_files(SourceConfig(name="s", paths=tuple(map(str, source_paths))))[0]]


def test_folders_are_searched_in_order_and_others_files_counted(tmp_path: Path):
    for name in ("b/2.txt", "b/1.jsonl", "a.txt", ".git/x.txt", ".hidden.txt", "b/notes.rst", "c/data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found, ignored = find_files(SourceConfig(name="s", paths=(str(tmp_path),)))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "b/1.jsonl", "b/2.txt"]
    assert dict(ignored) == {".rst": 1, ".csv": 1, "hidden": 2}


def test_a_folder_is_read_once_whatever_links_lead_to_it(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.txt").write_text("x")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert names([tmp_path]) == ["b.txt"]


def test_an_error_counts_the_other_files_of_its_own_path_only(tmp_path: Path):
    for name in ("first/a.txt", "first/b.rst", "second/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"second has no file .*, but 1 \.csv: convert"):
        names([tmp_path / "first", tmp_path / "second"])


def test_globs_match_files_and_each_file_counts_once(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d.rst").write_text("x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.txt").write_text("x")
    assert names([tmp_path / "[ab].txt"]) == ["a.txt", "b.txt"]
    assert names([tmp_path / "c[1].txt"]) == ["c[1].txt"]
    assert names([tmp_path / "a.txt", tmp_path / "*.txt"]) == ["a.txt", "b.txt", "c[1].txt"]
    assert names([tmp_path / "**"]) == ["a.txt", "b.txt", "c[1].txt", "e.txt"]
    assert names([tmp_path / "?"]) == ["e.txt"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none.txt", "no such file or folder"),
        ("none/*.txt", "matches nothing"),
        ("empty", "has no file of a type that dsllm reads"),
        ("a\0.txt", "is not a path"),
        ("~nobody-of-this-name/a.txt", "is not a path"),
        ("x" * 300, "File name too long"),
        ("table.csv/a.txt", "Not a directory"),
        ("table.csv", ".lz4), but 1 .csv: convert them"),
    ],
)
def test_paths_that_give_nothing_are_errors(path: str, problem: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.rst").write_text("x")
    (tmp_path / "table.csv").write_text("x")
    with pytest.raises(DataError) as caught:
        names([path if path.startswith("~") else tmp_path / path])
    assert (
        problem in str(caught.value)
        and "source 's'" in str(caught.value)
        and path.split("/")[0].replace("\0", "\\x00") in str(caught.value)
    )


def found_and_ignored(folder: Path) -> tuple[list[str], dict[str, int]]:
    found, ignored = find_files(SourceConfig(name="s", paths=(str(folder),)))
    return [path.relative_to(folder).as_posix() for path in found], dict(ignored)


def test_names_count_in_any_case_and_with_any_compression(tmp_path: Path):
    read = ["A.JSONL", "B.Txt.GZ", "c.ndjson.xz", "d.md", "e.json.bz2", "f.PQ", "g.txt.zstd", "h.jsonl.lz4", "i.json"]
    others = {
        "_SUCCESS": "_SUCCESS",
        "a.tar.gz": ".tar.gz",
        "b.txt~": ".txt~",
        "c.parquet.gz": ".parquet.gz",
        "d.gz": ".gz",
    }
    for name in (*read, *others):
        (tmp_path / name).write_text("x")
    assert found_and_ignored(tmp_path) == (read, dict.fromkeys(others.values(), 1))


def test_a_readme_directly_in_a_folder_describes_the_data(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/README.md", "a.txt"):
        (tmp_path / name).write_text("x")
    assert found_and_ignored(tmp_path) == (["a.txt", "docs/README.md"], {"README.md": 1})
    assert names([tmp_path / "README.md"]) == ["README.md"]


def test_what_the_library_datasets_writes_about_its_data_is_passed_over(tmp_path: Path):
    (tmp_path / "train").mkdir()
    for name in (
        "dataset_infos.json",
        "dataset_dict.json",
        "train/state.json",
        "train/dataset_info.json",
        "train/a.json",
    ):
        (tmp_path / name).write_text("{}")
    descriptions = ["dataset_dict.json", "dataset_infos.json", "dataset_info.json", "state.json"]
    assert found_and_ignored(tmp_path) == (["train/a.json"], dict.fromkeys(descriptions, 1))
    assert names([tmp_path / "train" / "state.json"]) == ["state.json"]


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(path: str):
    with pytest.raises(DataError, match=r"is not a path: write '\.' for the working directory"):
        names([path])


def test_folders_that_dsllm_has_written_are_passed_over(tmp_path: Path):
    for name in ("data/x/data_card.json", "data/x/manifest.json", "runs/x/data_card.json", "runs/x/eval/step-1.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "data" / "y.partial" / "records").mkdir(parents=True)
    (tmp_path / "data" / "y.partial" / "records" / "train-a-00000.json").write_text("{}")
    (tmp_path / "data" / "mine.json").write_text("{}")
    assert found_and_ignored(tmp_path) == (["data/mine.json"], {"folder of dsllm": 3})


def test_a_file_with_several_names_is_read_once(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "c.txt")
    (tmp_path / "docs").mkdir()
    (tmp_path / "same-content.txt").write_text("x")
    assert found_and_ignored(tmp_path) == (["a.txt", "same-content.txt"], {"second name of a file": 2})
    assert names([tmp_path / "a.txt", f"{tmp_path}/docs/../a.txt", tmp_path / "b.txt"]) == ["a.txt"]


def test_folders_and_files_of_any_name(tmp_path: Path):
    odd = os.fsdecode(b"caf\xe9 \n[x]")
    (tmp_path / odd / "part.jsonl").mkdir(parents=True)
    (tmp_path / odd / "part.jsonl" / "part-0.json").write_text("x")
    (tmp_path / odd / "a.txt\xe9").write_text("x")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    found, ignored = find_files(SourceConfig(name="s", paths=(str(tmp_path),)))
    assert [path.name for path in found] == ["gone.txt", "loop.txt", "part-0.json"]
    assert "".join(ignored).isprintable()
    assert names([tmp_path / odd]) == ["part-0.json"]
    assert names([f"{tmp_path}/*/*.jsonl"]) == ["part-0.json"]
