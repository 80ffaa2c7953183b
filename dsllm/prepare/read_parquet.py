"""Reads documents from one column of a Parquet file, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dsllm.prepare.document import BadInput, Document, Remark
from dsllm.prepare.read_json import not_decoded
from dsllm.prepare.text_lines import DAMAGED, Position, first_line

_ROWS = 256  # in memory at a time
_TEXT_TYPES = (
    *(pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view),
    *(pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view),
    pyarrow.types.is_fixed_size_binary,
)


def read_parquet(path: Path, text_field: str, position: Position) -> Iterator[Document | BadInput | Remark]:
    """The documents of a file: the values of a column of text, or of binary values that are UTF-8."""
    row, num_rows, num_bytes = 0, 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            num_rows = file.metadata.num_rows
            keys = _keys(file.schema_arrow, text_field)
            problem = _problem(file.schema_arrow, keys, text_field, str(path))
            if problem is not None:
                yield problem
                return
            for row, content in enumerate(_values(file, keys), start=1):
                position.file_bytes = num_bytes * row // num_rows
                yield _document(content, text_field, f"{path}, row {row}")
            if not row == num_rows == _rows_of_groups(file.metadata):  # a damaged footer has no checksum
                yield BadInput(f"{path}, after row {row}", DAMAGED, f"its footer gives {num_rows} rows")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        lost = f"{num_rows - row} rows are lost: " if num_rows else ""
        yield BadInput(f"{path}, after row {row}", DAMAGED, lost + first_line(error))


def _rows_of_groups(metadata: Any) -> int:
    """Number of rows by the metadata of the row groups."""
    return sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def _keys(schema: pyarrow.Schema, text_field: str) -> list[str]:
    """The names that lead to the column: its own, or those of the structs around it."""
    return [text_field] if text_field in schema.names else text_field.split(".")


def _problem(schema: pyarrow.Schema, keys: list[str], text_field: str, origin: str) -> BadInput | None:
    """Why the column cannot be read; None if it can."""
    fields: list[pyarrow.Field] = list(schema)
    kind: Any = None
    for depth, key in enumerate(keys):
        names = [field.name for field in fields]
        if names.count(key) > 1:
            return BadInput(origin, f"{names.count(key)} columns are named '{text_field}'")
        if key not in names:
            place = f"the columns of '{'.'.join(keys[:depth])}'" if depth else "its columns"
            return BadInput(origin, f"no field '{text_field}'", f"{place}: {', '.join(names) or f'none, it is {kind}'}")
        kind = fields[names.index(key)].type
        kind = kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind
        fields = [kind.field(i) for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(is_type(kind) for is_type in _TEXT_TYPES):
        return BadInput(origin, f"field '{text_field}' is not a string", f"it is {kind}")
    return None


def _values(file: pyarrow.parquet.ParquetFile, keys: list[str]) -> Iterator[bytes | None]:
    """The values of the column as bytes, so that one value that is not UTF-8 does not fail its whole batch."""
    for batch in file.iter_batches(batch_size=_ROWS, columns=[".".join(keys)]):
        column = batch.column(batch.schema.get_field_index(keys[0]))  # "a.b" also selects a column b in a struct a
        for key in keys[1:]:
            column = pyarrow.compute.struct_field(_plain(column), [key])  # null where the struct is
        yield from _plain(column).cast(pyarrow.large_binary()).to_pylist()


def _plain(column: pyarrow.Array) -> pyarrow.Array:
    """The column without an extension type and without a dictionary."""
    column = column.storage if isinstance(column, pyarrow.ExtensionArray) else column
    if not isinstance(column, pyarrow.DictionaryArray):
        return column
    values = column.dictionary.cast(pyarrow.large_binary())
    return values.take(column.indices)


def _document(content: bytes | None, text_field: str, origin: str) -> Document | BadInput:
    if content is None:
        return BadInput(origin, f"field '{text_field}' is not a string", "it is null")
    try:
        return Document(content.decode(), origin)
    except UnicodeDecodeError as error:
        return not_decoded(content, "utf-8", origin, error)
