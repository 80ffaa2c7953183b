"""Datasets in local folders are read as those on the hub are: one split, row by row."""

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
