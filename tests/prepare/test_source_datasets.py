"""Datasets in local folders are read as those on the hub are: one split, row by row."""

import shutil
from pathlib import Path

import datasets
import pytest

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.document import BadInput
from dsllm.prepare.source_datasets import dataset_documents
from tests.helpers.preparing import write_jsonl


def texts_in(folder: Path, **fields: object) -> list[str]:
    items = list(dataset_documents(SourceConfig(name="s", kind="dataset", dataset=str(folder), **fields)))
    return [item.reason if isinstance(item, BadInput) else item.text for item in items]


def test_a_saved_dataset_and_a_saved_dictionary_of_splits_are_read(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None], "number": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert texts_in(tmp_path / "one") == ["a", "b", "field 'text' is not a string"]
    assert texts_in(tmp_path / "two", dataset_split="test") == ["b"]
    with pytest.raises(DataError, match="no such split; it has train, test"):
        texts_in(tmp_path / "two", dataset_split="validation")
    with pytest.raises(DataError, match="has no field 'body'; set text_field to one of: text, number"):
        texts_in(tmp_path / "one", text_field="body")


def test_a_folder_of_files_is_streamed(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
    assert texts_in(tmp_path) == ["a", "b"]
    with pytest.raises(DataError, match=r"source 's': dataset .*split 'other'"):
        texts_in(tmp_path, dataset_split="other")


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"source 's': dataset .*empty"):
        texts_in(tmp_path / "empty")


@pytest.mark.parametrize("split", ["train[:50%]", "train+test"])
def test_a_part_of_a_split_is_refused_with_what_to_do(split: str, tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
    with pytest.raises(DataError, match=r"Bad split.*cannot be streamed: set max_megabytes instead"):
        texts_in(tmp_path, dataset_split=split)


def test_a_saved_dataset_without_splits_has_no_other_split(tmp_path: Path):
    datasets.Dataset.from_dict({"text": ["a"]}, split="validation").save_to_disk(tmp_path / "named")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "plain")
    assert texts_in(tmp_path / "named", dataset_split="validation") == texts_in(tmp_path / "plain") == ["a"]
    for folder, split in (("named", "test"), ("plain", "validation"), ("plain", "train[:50%]")):
        with pytest.raises(DataError, match="one dataset without splits: leave dataset_split out"):
            texts_in(tmp_path / folder, dataset_split=split)


def test_a_field_inside_a_column_is_named_with_dots(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"doc": {"text": "a"}}\n{"doc": {"text": null}}\n')
    assert texts_in(tmp_path, text_field="doc.text") == ["a", "field 'doc.text' is not a string"]
    with pytest.raises(DataError, match=r"has no field 'body\.text'; set text_field to one of: doc"):
        texts_in(tmp_path, text_field="body.text")


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_damaged_files_of_a_saved_dataset_are_an_error_in_words(content: bytes, tmp_path: Path):
    """Tries 6 contents in each of the files of a saved dictionary of splits, and in a folder of JSON lines."""
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
    for path in [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            assert texts_in(tmp_path / "saved") == ["a"]  # the file is not needed
        except DataError as error:
            assert str(error).startswith("source 's': dataset ")
        path.write_bytes(whole)
    shutil.rmtree(tmp_path / "saved")
    if content in (b"null", b"[" * 100_000):
        return  # pyarrow's reader of JSON lines, which the library calls, ends the process there
    (tmp_path / "train.jsonl").write_bytes(content)
    try:
        texts_in(tmp_path)
    except DataError as error:
        assert str(error).startswith("source 's': dataset ")
