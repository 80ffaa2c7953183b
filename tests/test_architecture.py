"""Files and functions stay small, and every file says what it is for; pyproject.toml has the contracts of imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("dsllm", "launch", "bench") for p in (ROOT / folder).rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 6
MAX_NESTING = 3

EXCEPTIONS: dict[str, str] = {}
"""'dsllm/path.py' or 'dsllm/path.py::function' -> why it may be over a limit."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def functions_in(file: Path) -> list[Function]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def num_arguments(function: Function) -> int:
    """Arguments that a caller may give; `self` and `cls` are not given."""
    arguments = function.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


def nesting(statements: list[ast.stmt]) -> int:
    """Depth of the deepest block; an `elif` stands beside its `if`, and a nested function is counted by itself."""
    deepest = 0
    for statement in statements:
        if not isinstance(statement, BLOCKS):
            continue
        inner = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        inner += [handler.body for handler in getattr(statement, "handlers", [])]
        inner += [case.body for case in getattr(statement, "cases", [])]
        for block in inner:
            is_elif = isinstance(statement, ast.If) and block is statement.orelse and is_one_if(block)
            deepest = max(deepest, nesting(block) + (0 if is_elif else 1))
    return deepest


def is_one_if(block: list[ast.stmt]) -> bool:
    return len(block) == 1 and isinstance(block[0], ast.If)


def over_limits(file: Path) -> list[str]:
    """What in this file is over a limit and not excused."""
    name = name_of(file)
    lines = len(file.read_text(encoding="utf-8").splitlines())
    found = [(name, f"{lines} lines, at most {MAX_FILE_LINES}")] if lines > MAX_FILE_LINES else []
    for function in functions_in(file):
        where = f"{name}::{function.name}"
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        measured = [
            (length, MAX_FUNCTION_LINES, "lines"),
            (num_arguments(function), MAX_ARGUMENTS, "arguments"),
            (nesting(function.body), MAX_NESTING, "nested blocks"),
        ]
        found += [(where, f"{value} {what}, at most {limit}") for value, limit, what in measured if value > limit]
    return [f"{where}: {problem}" for where, problem in found if where not in EXCEPTIONS]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_opens_with_a_sentence_and_stays_small(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if file.name != "__init__.py" or file.read_text().strip():
        assert docstring, f"{name_of(file)} does not say what it is for"
        first_line = docstring.splitlines()[0]
        assert first_line.endswith((".", ":")) and len(first_line) > 20, f"{name_of(file)}: '{first_line}'"
    assert not over_limits(file)


def test_exceptions_are_still_needed() -> None:
    known = {name_of(f) for f in FILES} | {f"{name_of(f)}::{fn.name}" for f in FILES for fn in functions_in(f)}
    assert set(EXCEPTIONS) <= known


def test_limits_catch_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    deep = "def f(a, b, c, d, e, g, h):\n if a:\n  for x in b:\n   while c:\n    with d:\n     return x\n"
    (tmp_path / "bad.py").write_text(deep + "\n".join(f"x{i} = 0" for i in range(MAX_FILE_LINES)))
    problems = " ".join(over_limits(tmp_path / "bad.py"))
    assert "7 arguments" in problems and "4 nested" in problems and "lines" in problems
    flat = "def f(a):\n" + "".join(f" {word} a == {word!r}:\n  return\n" for word in ("if", *["elif"] * MAX_NESTING))
    (tmp_path / "good.py").write_text(flat)
    assert not over_limits(tmp_path / "good.py")
