"""Reads documents through the `datasets` library: a name on the Hugging Face hub or a local folder, streamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError, require
from dsllm.prepare.document import BadInput, Document
from dsllm.prepare.read_json import document_in


def dataset_documents(source: SourceConfig) -> Iterator[Document | BadInput]:
    """The rows of one split of a dataset, in its order.

    Raises:
        DataError: the dataset, subset or split does not exist or cannot be reached, or reading it fails half-way. This
            is never skipped: we could not count the documents that are missing.
    """
    datasets = require("datasets")
    assert source.dataset is not None, "checked when the config was loaded"
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    row = 0
    try:
        rows = _open(datasets, source)
        columns = rows.column_names
        if columns is not None and source.text_field not in columns:
            raise DataError(
                f"source '{source.name}': dataset {source.dataset} has no field '{source.text_field}'; "
                f"set text_field to one of: {', '.join(columns)}"
            )
        for record in rows:
            row += 1
            yield document_in(record, source.text_field, f"{source.dataset}, row {row}")
    except failures as error:
        where = f"after row {row}" if row else f"split '{source.dataset_split}'"
        raise DataError(
            f"source '{source.name}': dataset {source.dataset}, {where}: {type(error).__name__}: {error}"
        ) from error


def _open(datasets: Any, source: SourceConfig) -> Any:
    """Open the split without reading it."""
    folder = Path(source.dataset or "").expanduser()
    if (folder / "state.json").is_file():  # a Dataset, written by save_to_disk
        return datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():  # a DatasetDict, written by save_to_disk
        splits = datasets.load_from_disk(str(folder))
        if source.dataset_split not in splits:
            raise ValueError(f"no such split; it has {', '.join(splits)}")
        return splits[source.dataset_split]
    name = str(folder) if folder.is_dir() else source.dataset
    return datasets.load_dataset(name, source.subset, split=source.dataset_split, streaming=True)
