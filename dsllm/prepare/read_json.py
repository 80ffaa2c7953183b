"""Reads documents from JSON: one object per line, an array of objects, or objects over several lines."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from dsllm.prepare.decompress import DAMAGE
from dsllm.prepare.document import BadInput, Document
from dsllm.prepare.file_kinds import HEAD_BYTES
from dsllm.prepare.text_lines import DAMAGED, MOST_BYTES, OpenFile, Position, first_line

_READ_CHARACTERS = 2**18
_TAIL = 16  # characters: a parser that stops so close to what has been read may need more
_WHITE = " \t\n\r"
_SPACE = re.compile(f"[{_WHITE}]*")


def read_json_lines(file: OpenFile, text_field: str, position: Position) -> Iterator[Document | BadInput]:
    """The documents of a file with one JSON object per line."""
    for number, line in file.lines(position):
        origin = f"{file.path}, line {number}"
        if isinstance(line, BadInput):
            yield line
        elif not line.strip():
            yield Document("", origin)  # will be counted as empty
        else:
            yield _parsed(line, text_field, origin, file.line_encoding, first=number == 1)


def read_json(file: OpenFile, text_field: str, position: Position) -> Iterator[Document | BadInput]:
    """The documents of a .json file: lines, an array, or objects over several lines, by how it begins."""
    beginning = file.stream.peek(HEAD_BYTES)[:HEAD_BYTES].decode(file.encoding, "ignore")
    beginning = beginning.removeprefix("\ufeff").lstrip(_WHITE)
    if beginning.startswith("[") or beginning.replace("\r", "\n").partition("\n")[0].rstrip(_WHITE) == "{":
        return _read_values(file, text_field, position)
    return read_json_lines(file, text_field, position)


def document_in(record: Any, text_field: str, origin: str) -> Document | BadInput:
    """The document in a record: a string under `text_field`, or under its parts between dots in objects inside objects."""
    if not isinstance(record, dict):
        return BadInput(origin, "not a JSON object", f"it is {type_name(record)}")
    text: Any = record
    if text_field in record:
        text = record[text_field]
    else:
        parts = text_field.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(text, dict) or part not in text:
                return BadInput(origin, f"no field '{text_field}'", _what_is_there(text, parts[:depth]))
            text = text[part]
    if not isinstance(text, str):
        return BadInput(origin, f"field '{text_field}' is not a string", f"it is {type_name(text)}")
    return Document(text, origin)


def _what_is_there(value: Any, parts: list[str]) -> str:
    """The fields of an object, or the type of something else, under these keys of a record."""
    fields = f"fields: {', '.join(map(str, value)) or 'none'}" if isinstance(value, dict) else type_name(value)
    return f"'{'.'.join(parts)}': {fields}" if parts else f"its {fields}"


def type_name(value: Any) -> str:
    """The type of a JSON value, to show to people."""
    return "null" if value is None else type(value).__name__


def _parsed(line: bytes, text_field: str, origin: str, encoding: str, first: bool) -> Document | BadInput:
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        return not_decoded(line, encoding, origin, error)
    try:
        record = json.loads(text.removeprefix("\ufeff") if first else text)
    except (ValueError, RecursionError) as error:
        if not text.endswith(("\n", "\r")) and not str(error).startswith("Extra data"):
            return BadInput(origin, "the file ends in the middle of a line")
        array = "; an array is read from a file named .json, or write one object per line"
        return BadInput(origin, "not valid JSON", f"{error}{array if text.lstrip().startswith('[') else ''}")
    return document_in(record, text_field, origin)


def not_decoded(content: bytes, encoding: str, origin: str, error: UnicodeDecodeError) -> BadInput:
    """A text that is not in the encoding it should be in."""
    reason = "not UTF-8" if encoding == "utf-8" else f"not {encoding}"
    hint = ": set encoding for this source, for example latin-1, if it has another one" if encoding == "utf-8" else ""
    return BadInput(origin, reason, f"byte {error.start} is {content[error.start]:#04x}{hint}")


def _read_values(file: OpenFile, text_field: str, position: Position) -> Iterator[Document | BadInput]:
    number = 0
    try:
        with io.TextIOWrapper(file.stream, file.encoding, newline="") as text:
            for value in _Values(text):
                number += 1
                position.file_bytes = file.raw.tell()
                yield document_in(value, text_field, f"{file.path}, element {number}")
    except UnicodeError as error:
        yield BadInput(f"{file.path}, after element {number}", f"not {file.encoding}", first_line(error))
    except (ValueError, RecursionError) as error:
        detail = f"{first_line(error)}; what follows is not read"
        yield BadInput(f"{file.path}, after element {number}", "not valid JSON", detail)
    except DAMAGE as error:
        yield BadInput(f"{file.path}, after element {number}", DAMAGED, first_line(error))


class _Values:
    """The elements of a JSON array, or JSON values one after the other, parsed as they are read.

    Iterating raises ValueError or RecursionError where the text is not JSON.
    """

    def __init__(self, file: io.TextIOWrapper):
        self._file = file
        self._text = file.read(_READ_CHARACTERS).removeprefix("\ufeff")
        self._at = 0
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        in_array = self._next_character() == "["
        if in_array:
            self._at += 1
            if self._next_character() == "]":
                self._end_array()
                return
        while self._next_character():
            yield self._value()
            if not in_array:
                continue
            match self._next_character():
                case ",":
                    self._at += 1
                case "]":
                    self._end_array()
                    return
                case "":
                    break
                case other:
                    raise ValueError(f"{other!r} instead of a comma or ] after an element")
        if in_array:
            raise ValueError("the file ends inside its array")

    def _end_array(self) -> None:
        self._at += 1
        if extra := self._next_character():
            raise ValueError(f"{extra!r} follows the array")

    def _next_character(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "it also matches where there is none"
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _TAIL
                if not (is_cut and self._read_more()):
                    raise
                continue
            if end < len(self._text) or not self._read_more():  # a number may continue in what has not been read
                self._at = end
                return value

    def _read_more(self) -> bool:
        """Read as much again as is left, so that a long value is parsed a few times only; False at the end."""
        rest = self._text[self._at :]
        if len(rest) > MOST_BYTES:
            raise ValueError(f"a value is longer than {MOST_BYTES >> 20:,} MiB")
        more = self._file.read(max(_READ_CHARACTERS, len(rest)))
        self._text, self._at = rest + more, 0
        return bool(more)
