"""The embedded corpus is the hand-written part of the standard library, read without importing it."""

import sys
from pathlib import Path

import pytest

from dsllm.errors import DataError
from dsllm.prepare.document import BadInput, Document
from dsllm.prepare.embedded import PARTS, embedded_documents


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "argparse.py": b'"""Parse\r\narguments."""\n\n'
        b'def f():\n    """Do f.\n\n    More.\n    """\n    def inner():\n        "Help."\n',
        "latin.py": b"# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n",
        "broken.py": b"# caf\xe9\n",
        "empty.py": b"",
        "boom.py": b"raise SystemExit('imported')\n",
        "pkg/__init__.py": b"class C:\n    'About C.'\n",
        "pkg/z.py": b"x = 1\n",
        "test/test_x.py": b"left out",
        "site-packages/other.py": b"left out",
        "encodings/table.py": b"left out",
        "pydoc_data/topics.py": b"# made by a program\ntopics = {'b': 'about b\\r\\n',\n 'a': 'about a'}\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def as_pairs(items: list[Document | BadInput]) -> list[tuple[str, str]]:
    return [
        (item.origin, item.text) if isinstance(item, Document) else ("bad", Path(item.origin).name) for item in items
    ]


def test_topics_are_read_in_the_order_of_their_names(library: Path):
    assert as_pairs(list(embedded_documents(("topics",), library))) == [
        ("topic a", "about a"),
        ("topic b", "about b\n"),
    ]


def test_sources_are_whole_modules_with_plain_newlines(library: Path):
    items = as_pairs(list(embedded_documents(("sources",), library)))
    names = [name for name, _ in items]
    assert names == [
        "module argparse",
        "module boom",
        "bad",
        "module empty",
        "module latin",
        "module pkg",
        "module pkg.z",
    ]
    assert dict(items)["module latin"].endswith("'café'\n")
    assert dict(items)["module argparse"].startswith('"""Parse\narguments.')
    assert dict(items)["bad"] == "broken.py"


def test_docstrings_stand_under_the_names_of_what_they_describe(library: Path):
    items = dict(as_pairs([i for i in embedded_documents(("docstrings",), library) if isinstance(i, Document)]))
    assert items == {
        "docstrings of argparse": "argparse\n\nParse\narguments.\n\nargparse.f\n\nDo f.\n\nMore.\n\n"
        "argparse.f.inner\n\nHelp.\n",
        "docstrings of pkg": "pkg.C\n\nAbout C.\n",
    }


def test_docstrings_are_not_read_twice(library: Path):
    assert as_pairs(list(embedded_documents((), library))) == as_pairs(list(embedded_documents(PARTS, library)))
    assert as_pairs(list(embedded_documents(PARTS, library))) == as_pairs(
        list(embedded_documents(("topics", "sources"), library))
    )


def test_this_python_has_megabytes_of_it():
    before = set(sys.modules)
    documents = list(embedded_documents(()))
    assert not {name for name in set(sys.modules) - before if not name.startswith("_")} & {
        "this",
        "antigravity",
        "turtle",
    }
    assert all(isinstance(document, Document) for document in documents)
    assert sum(len(document.text) for document in documents) > 5e6
    assert documents == list(embedded_documents(()))


def test_unknown_parts_and_pythons_without_sources_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no part named 'topic'; its parts are topics, docstrings, sources"):
        list(embedded_documents(("topic",)))
    with pytest.raises(DataError, match="contains no Python sources"):
        list(embedded_documents((), tmp_path))
