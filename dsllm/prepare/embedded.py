"""The embedded corpus: text that every Python installation has, read from files and never imported.

Three parts: `topics` are the help texts behind `help('for')`; `sources` are the modules of the standard library, one
document each; `docstrings` are the documentation in them. A docstring stands in its module's source, so where the
sources are read the docstrings are not repeated: text that appears twice would be both trained on and held out.
"""

import ast
import inspect
import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from dsllm.errors import DataError
from dsllm.prepare.document import BadInput, Document

PARTS = ("topics", "docstrings", "sources")
_TOPICS_FILE = Path("pydoc_data", "topics.py")
_LEFT_OUT_FOLDERS = frozenset(
    [
        *("test", "tests", "idle_test"),
        *("site-packages", "dist-packages", "_bundled"),  # what others made
        *("encodings", "pydoc_data"),  # tables that a program wrote
        *("__pycache__", "lib-dynload", "__phello__"),
    ]
)
_LEFT_OUT_FILES = frozenset(  # tables that a program wrote, and a text in cipher
    ["stringprep.py", "html/entities.py", "msilib/schema.py", "msilib/sequence.py", "this.py"]
)


def embedded_documents(parts: tuple[str, ...], root: Path | None = None) -> Iterator[Document | BadInput]:
    """The documents of some parts (none named: all), in the order of their names.

    Args:
        parts: of `PARTS`.
        root: folder of the standard library; nothing: this Python's.

    Raises:
        DataError: an unknown part, or this Python has no such files.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise DataError(
            f"embedded corpus: no part named {', '.join(map(repr, unknown))}; its parts are {', '.join(PARTS)}"
        )
    wanted = set(parts or PARTS)
    root = root or Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise DataError(f"embedded corpus: {root} holds no Python sources: name files of your own in data.sources")
    if "topics" in wanted:
        yield from _topics(root)
    if "sources" in wanted:
        yield from _sources(root)
    elif "docstrings" in wanted:
        yield from _docstrings(root)


def python_version() -> str:
    """The Python build that decides what the embedded corpus is."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def _topics(root: Path) -> Iterator[Document | BadInput]:
    """The dictionary in pydoc_data/topics.py, read as a literal."""
    path = root / _TOPICS_FILE
    if not path.is_file():  # some distributions ship the documentation apart
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
    """One document per module: each docstring under the name of what it describes."""
    for module, path in _modules(root):
        text = _read(path)
        if isinstance(text, BadInput):
            yield text
            continue
        described = [f"{name}\n\n{docstring}\n" for name, docstring in _described(ast.parse(text), module)]
        if described:
            yield Document("\n".join(described), f"docstrings of {module}")


def _described(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of a module, class or function and of what it defines, in their order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield name, inspect.cleandoc(docstring)
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _described(inner, f"{name}.{inner.name}")


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Names and files of the modules people wrote, sorted by name."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _LEFT_OUT_FOLDERS and not name.startswith("config-")
        ]
        for name in names:
            relative = Path(folder, name).relative_to(root)
            if (
                name.endswith(".py")
                and not name.startswith("_sysconfigdata")
                and relative.as_posix() not in _LEFT_OUT_FILES
            ):
                module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
                found.append((module, Path(folder, name)))
    return sorted(found)


def _read(path: Path) -> str | BadInput:
    """A source file's text, decoded as Python would."""
    try:
        content = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return _plain_newlines(content.decode(encoding))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        return BadInput(str(path), "not readable as Python source", str(error))


def _plain_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
