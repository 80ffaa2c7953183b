"""Reads the embedded corpus: text that every Python installation has. Modules are read as files, never imported.

It has three parts: `topics` are the help texts behind `help('for')`; `sources` are the modules of the standard library,
one document each; `docstrings` are the docstrings in those modules, one document per module. The sources contain the
docstrings, so `docstrings` are skipped when `sources` are read: text that appears twice could be both trained on and
held out.
"""

import ast
import inspect
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from dsllm.errors import DataError
from dsllm.prepare.document import BadInput, Document

PARTS = ("topics", "docstrings", "sources")
_TOPICS_FILE = Path("pydoc_data", "topics.py")
_SKIPPED_FOLDERS = frozenset(
    [
        *("test", "tests", "idle_test"),
        *("site-packages", "dist-packages", "_bundled"),  # not part of Python
        *("encodings", "pydoc_data"),  # generated tables
        *("__pycache__", "lib-dynload", "__phello__"),
    ]
)
_SKIPPED_FILES = frozenset(  # generated tables, and an enciphered text
    ["stringprep.py", "html/entities.py", "msilib/schema.py", "msilib/sequence.py", "this.py"]
)


def embedded_documents(parts: tuple[str, ...], root: Path | None = None) -> Iterator[Document | BadInput]:
    """The documents of some parts of the embedded corpus, each part sorted by name.

    Args:
        parts: some of `PARTS`; empty: all of them.
        root: folder of a standard library. None (default): that of this Python.

    Raises:
        DataError: a part is unknown, or the folder contains no Python sources.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise DataError(
            f"embedded corpus: no part named {', '.join(map(repr, unknown))}; its parts are {', '.join(PARTS)}"
        )
    parts = parts or PARTS
    root = root or Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise DataError(f"embedded corpus: {root} contains no Python sources: name your own files in data.sources")
    if "topics" in parts:
        yield from _topics(root)
    if "sources" in parts:
        yield from _sources(root)
    elif "docstrings" in parts:
        yield from _docstrings(root)


def _topics(root: Path) -> Iterator[Document | BadInput]:
    """The entries of the dictionary in pydoc_data/topics.py, which is parsed as a literal."""
    path = root / _TOPICS_FILE
    if not path.is_file():  # some distributions package the documentation separately
        yield BadInput(str(path), "no such file", "this Python has no pydoc topics")
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    literals = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    topics: dict[str, str] = ast.literal_eval(literals[0]) if literals else {}
    for name in sorted(topics):
        yield Document(_plain_newlines(topics[name]), f"topic {name}")


def _sources(root: Path) -> Iterator[Document | BadInput]:
    for module, path in _modules(root):
        text = _read(path)
        yield Document(text, f"module {module}") if isinstance(text, str) else text


def _docstrings(root: Path) -> Iterator[Document | BadInput]:
    """One document per module: each docstring below the name of its module, class or function."""
    for module, path in _modules(root):
        text = _read(path)
        if isinstance(text, BadInput):
            yield text
            continue
        described = [f"{name}\n\n{docstring}\n" for name, docstring in _described(ast.parse(text), module)]
        if described:
            yield Document("\n".join(described), f"docstrings of {module}")


def _described(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of a module, class or function and of everything defined in it, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield name, inspect.cleandoc(docstring)
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _described(inner, f"{name}.{inner.name}")


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Names and files of the hand-written modules, sorted by name."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            relative = Path(folder, name).relative_to(root)
            if (
                name.endswith(".py")
                and not name.startswith("_sysconfigdata")
                and relative.as_posix() not in _SKIPPED_FILES
            ):
                module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
                found.append((module, Path(folder, name)))
    return sorted(found)


def _read(path: Path) -> str | BadInput:
    """The text of a source file, decoded as Python does."""
    try:
        content = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return _plain_newlines(content.decode(encoding))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        return BadInput(str(path), "not readable as Python source", str(error))


def _plain_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
