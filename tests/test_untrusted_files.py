"""A name stays in its folder, and a file that is no file, too large or no JSON is refused in words."""

import os
from pathlib import Path

import pytest

from dsllm.untrusted_files import UntrustedFileError, inside, parse_json, read_bounded, read_json


@pytest.mark.parametrize("name", ["a", "a/b.json", "./a", "..a", "a..b"])
def test_names_in_the_folder(tmp_path: Path, name: str):
    assert inside(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "..", "../a", "a/../../b", "a\0b", "..\\a", None, 3, ["a"]])
def test_names_that_leave_the_folder(tmp_path: Path, name: object):
    with pytest.raises(UntrustedFileError):
        inside(tmp_path, name)


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UntrustedFileError, match="not a file"):
            read_bounded(path)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "missing")


def test_the_size_is_bounded(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(UntrustedFileError, match="is 5 bytes long; at most 4 are read"):
        read_bounded(path, 4)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\0" * 9, "is empty"),
        (b"{", "Expecting property name"),
        (b"\xff{}", "not UTF-8 text .byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"NaN", "NaN is not a finite number"),
        (b"[1e999]", "1e999 is not a finite number"),
        (b"1" * 5000, "digits"),
    ],
)
def test_what_is_no_json_is_refused_in_words(content: bytes, why: str):
    with pytest.raises(UntrustedFileError, match=why):
        parse_json(content)


def test_json_is_read(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null]}\r\n')
    assert read_json(path) == {"a": [1, 2.5, None]}
