"""Finds the files of a source: paths, folders and globs, each file once; counts what is passed over."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.document import shown
from dsllm.prepare.file_kinds import COMPRESSIONS, FORMATS, kind_by_name, type_of_name
from dsllm.prepare.workspace import CARD_FILE

HIDDEN = "hidden"
"""How names that begin with a dot are counted; what is below such a folder is not."""
SAME_FILE = "second name of a file"
"""How links to files that are read already are counted."""
WRITTEN_BY_DSLLM = "folder of dsllm"
"""How folders of prepared data and of runs are counted."""
_DATASET_CARD = "readme.md"
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""JSON files that the library datasets writes about its data."""


def find_files(source: SourceConfig) -> tuple[list[Path], Counter[str]]:
    """The files named by a source's paths, in order, each once; and the number of files passed over, by suffix.

    Folders are searched recursively, sorted by name; names that begin with a dot are skipped, and so are files that describe
    the data: a README.md directly in a folder that a path names, and the JSON files that the library datasets writes.

    Raises:
        DataError: a path does not exist, a glob matches nothing, or there is no file of a type that we read.
    """
    found: list[Path] = []
    ignored: Counter[str] = Counter()
    for pattern in source.paths:
        others: Counter[str] = Counter()
        read = [path for path in _candidates(pattern, source.name, others) if _is_read(path, others)]
        ignored += others
        if not read:
            raise DataError(f"source '{source.name}': {pattern} {_nothing_to_read(others)}")
        found += read
    return _each_once(found, ignored), ignored


def _is_read(path: Path, others: Counter[str]) -> bool:
    """Whether we read files of this name; counts it otherwise."""
    if kind_by_name(path.name) is not None:
        return True
    others[shown(type_of_name(path.name))] += 1
    return False


def _nothing_to_read(others: Counter[str]) -> str:
    suffixes = f"{', '.join(FORMATS)}, all but .parquet also with {', '.join(COMPRESSIONS)}"
    problem = f"has no file of a type that dsllm reads ({suffixes})"
    other_types = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(20))
    if not other_types:
        return problem
    return f"{problem}, but {other_types}: convert them, or name other files; kind: dataset also reads .csv and .arrow"


def _each_once(paths: list[Path], ignored: Counter[str]) -> list[Path]:
    """The paths in order, without further names of the same file: links, and other ways to write a path."""
    first: dict[object, Path] = {}
    for path in paths:
        kept = first.setdefault(_identity(path), path)
        if kept != path and os.path.abspath(kept) != os.path.abspath(path):
            ignored[SAME_FILE] += 1
    return list(first.values())


def _identity(path: Path) -> object:
    """Equal for two names of one file."""
    try:
        status = path.stat()
    except OSError:
        return str(path)  # reading it will report the problem
    if status.st_nlink > 1:  # only then: some network file systems make up the numbers of files
        return (status.st_dev, status.st_ino)
    return os.path.realpath(path)


def path_of(pattern: str, source: str) -> Path:
    """A source's path, with the home directory for ~.

    Raises:
        DataError: it is empty, contains a zero byte, or names the home of nobody.
    """
    if not pattern.strip():
        raise DataError(f"source '{source}': {pattern!r} is not a path: write '.' for the working directory")
    if "\0" in pattern:
        raise DataError(f"source '{source}': {shown(pattern)} is not a path: it contains a zero byte")
    try:
        return Path(pattern).expanduser()
    except RuntimeError as error:
        raise DataError(f"source '{source}': {shown(pattern)} is not a path: {error}") from error


def _candidates(pattern: str, source: str, others: Counter[str]) -> list[Path]:
    """The files of any type that a path or glob names."""
    path = path_of(pattern, source)
    try:
        path.lstat()
        places = [path]
    except OSError as error:
        if not glob.has_magic(pattern):
            why = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise DataError(f"source '{source}': {shown(pattern)}: {why} (working directory {Path.cwd()})") from error
        places = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not places:
        raise DataError(f"source '{source}': {pattern} matches nothing (working directory {Path.cwd()})")
    found = [file for place in places for file in (_walk(place, others) if place.is_dir() else [place])]
    return list(dict.fromkeys(found))


def _walk(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """Files below a folder, sorted by name; follows links, but visits each folder once."""
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=_not_listed, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        if _is_written_by_dsllm(place, subfolders, names):
            others[WRITTEN_BY_DSLLM] += 1
            subfolders.clear()
            continue
        others[HIDDEN] += sum(name.startswith(".") for name in [*subfolders, *names])
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name in _DESCRIPTIONS or (place == str(folder) and name.lower() == _DATASET_CARD):
                others[name] += 1
            elif not name.startswith("."):
                yield Path(place, name)
    others += Counter()  # drops a count of zero


def _is_written_by_dsllm(place: str, subfolders: list[str], names: list[str]) -> bool:
    """Whether a folder is prepared data, a run, or a preparation that was interrupted: its JSON files are no sources."""
    return CARD_FILE in names or (place.endswith(".partial") and not {"spool", "records"}.isdisjoint(subfolders))


def _not_listed(error: OSError) -> None:
    raise DataError(f"{shown(error.filename)}: this folder cannot be listed: {error.strerror}") from error
