"""Reads documents through the `datasets` library: a name on the Hugging Face hub or a local folder, streamed."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError, require
from dsllm.prepare.document import BadInput, Document, shown
from dsllm.prepare.read_json import document_in

_FAILURES = (
    *(OSError, ValueError, RuntimeError, EOFError, zlib.error, pyarrow.ArrowException),
    # what the library raises for files that are JSON and have another structure, and for an empty file
    *(TypeError, AttributeError, LookupError, StopIteration),
)


def dataset_documents(source: SourceConfig) -> Iterator[Document | BadInput]:
    """The rows of one split of a dataset, in its order.

    Raises:
        DataError: the dataset, subset or split does not exist or cannot be reached, or reading it fails half-way. This
            is never skipped: we could not count the documents that are missing.
    """
    assert source.dataset is not None, "checked when the config was loaded"
    for row, record in enumerate(_rows(source), start=1):
        yield document_in(record, source.text_field, f"{source.dataset}, row {row}")


def _rows(source: SourceConfig) -> Iterator[Any]:
    """The rows of the split; what the library raises becomes a DataError."""
    datasets = require("datasets")
    row = 0
    try:
        rows = _open(datasets, source)
        columns = rows.column_names
        if columns is not None and not {source.text_field, source.text_field.split(".")[0]} & set(columns):
            raise DataError(
                f"source '{source.name}': dataset {source.dataset} has no field '{source.text_field}'; "
                f"set text_field to one of: {', '.join(columns)}"
            )
        for record in rows:
            row += 1
            yield record
    except (*_FAILURES, datasets.exceptions.DatasetsError) as error:
        where = f"after row {row}" if row else f"split '{source.dataset_split}'"
        is_part = set(source.dataset_split) & set("[+%")
        hint = (
            ". A part of a split, or a sum of splits, cannot be streamed: set max_megabytes instead" if is_part else ""
        )
        raise DataError(
            f"source '{source.name}': dataset {source.dataset}, {where}: {type(error).__name__}: {shown(error)}{hint}"
        ) from error


def _open(datasets: Any, source: SourceConfig) -> Any:
    """Open the split without reading it."""
    folder = Path(source.dataset or "").expanduser()
    if (folder / "state.json").is_file():  # a Dataset, written by save_to_disk
        rows = datasets.load_from_disk(str(folder))
        if source.dataset_split not in ("train", str(rows.split)):
            raise ValueError("this folder contains one dataset without splits: leave dataset_split out")
        return rows
    if (folder / "dataset_dict.json").is_file():  # a DatasetDict, written by save_to_disk
        splits = datasets.load_from_disk(str(folder))
        if source.dataset_split not in splits:
            raise ValueError(f"no such split; it has {', '.join(splits)}")
        return splits[source.dataset_split]
    name = str(folder) if folder.is_dir() else source.dataset
    return datasets.load_dataset(name, source.subset, split=source.dataset_split, streaming=True)
