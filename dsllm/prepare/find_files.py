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

HIDDEN = "hidden"
"""How names that begin with a dot are counted; what is below such a folder is not."""
SAME_FILE = "second name of a file"
"""How links to files that are read already are counted."""
_DATASET_CARD = "readme.md"


def find_files(source: SourceConfig) -> tuple[list[Path], Counter[str]]:
    """The files named by a source's paths, in order, each once; and the number of files passed over, by suffix.

    Folders are searched recursively, sorted by name; names that begin with a dot are skipped, and so is a README.md directly
    in a folder that a path names: it describes the data.

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


def _candidates(pattern: str, source: str, others: Counter[str]) -> list[Path]:
    """The files of any type that a path or glob names."""
    try:
        path = Path(pattern).expanduser()
        path.lstat()
        places = [path]
    except (RuntimeError, ValueError) as error:  # a home of nobody; a zero byte
        raise DataError(f"source '{source}': {shown(pattern)}: is not a path: {error}") from error
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
        others[HIDDEN] += sum(name.startswith(".") for name in [*subfolders, *names])
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if place == str(folder) and name.lower() == _DATASET_CARD:
                others[name] += 1
            elif not name.startswith("."):
                yield Path(place, name)
    others += Counter()  # drops a count of zero


def _not_listed(error: OSError) -> None:
    raise DataError(f"{shown(error.filename)}: this folder cannot be listed: {error.strerror}") from error
