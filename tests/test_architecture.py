"""Files and functions stay small, every file says what it is for, every module has a test at the mirrored path.

ruff limits arguments, nesting and complexity, import-linter the imports (pyproject.toml); here is what they cannot check.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("dsllm", "launch", "bench") for p in (ROOT / folder).rglob("*.py"))
MODULES = sorted(p for p in (ROOT / "dsllm").rglob("*.py") if not p.stem.startswith("__"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

LONG: dict[str, str] = {}
"""'dsllm/path.py' or 'dsllm/path.py::function' -> why it may have more lines."""

TESTED_ELSEWHERE = {
    "dsllm/api_engine.py": "tests/test_api.py",
    "dsllm/batches.py": "tests/data/test_training.py",
    "dsllm/byte_units.py": "tests/doctor/test_disks.py",
    "dsllm/checkpoint/hugging_face_export.py": "tests/checkpoint/test_hugging_face.py",
    "dsllm/checkpoint/hugging_face_fields.py": "tests/checkpoint/test_hugging_face_config.py",
    "dsllm/checkpoint/hugging_face_files.py": "tests/checkpoint/test_hugging_face.py",
    "dsllm/checkpoint/hugging_face_names.py": "tests/checkpoint/test_hugging_face.py",
    "dsllm/checkpoint/source.py": "tests/session/test_run_file.py",
    "dsllm/cli/doctor_report.py": "tests/cli/test_doctor.py",
    "dsllm/cli/doctor_request.py": "tests/cli/test_doctor.py",
    "dsllm/cli/dry_run.py": "tests/cli/test_main.py",
    "dsllm/cli/export.py": "tests/cli/test_saved_models.py",
    "dsllm/cli/parity_report.py": "tests/cli/test_parity.py",
    "dsllm/cli/prepare_report.py": "tests/cli/test_prepare.py",
    "dsllm/config/check_cluster.py": "tests/config/test_cluster.py",
    "dsllm/config/data.py": "tests/config/test_check.py",
    "dsllm/config/explain.py": "tests/config/test_load.py",
    "dsllm/config/fields.py": "tests/config/test_compare.py",
    "dsllm/config/model.py": "tests/config/test_check.py",
    "dsllm/config/optimizer.py": "tests/engine/test_optimizers.py",
    "dsllm/config/parallel.py": "tests/test_mesh.py",
    "dsllm/config/paths.py": "tests/test_shipped_configs.py",
    "dsllm/config/run.py": "tests/config/test_load.py",
    "dsllm/config/train.py": "tests/config/test_check.py",
    "dsllm/config/yaml_file.py": "tests/config/test_load.py",
    "dsllm/engine/wrappers/skipped_step.py": "tests/engine/test_offload.py",
    "dsllm/engine/wrappers/swapped_groups.py": "tests/engine/test_nvme.py",
    "dsllm/parity/engine_run.py": "tests/parity/test_table.py",
    "dsllm/parity/reference.py": "tests/parity/test_bounds.py",
    "dsllm/session/start.py": "tests/session/test_open.py",
    "dsllm/version.py": "tests/test_packaging.py",
}
"""A module without a test at its mirrored path -> the test that covers it, or why it needs none. Please make it shorter."""


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def mirrored(module: Path) -> Path:
    """Where a module's test belongs: dsllm/data/shards.py, tests/data/test_shards.py."""
    inside = module.relative_to(ROOT / "dsllm")
    return ROOT / "tests" / inside.parent / f"test_{inside.name}"


def too_long(file: Path) -> list[str]:
    """What in this file has too many lines and is not excused."""
    text = file.read_text(encoding="utf-8")
    lengths = [(name_of(file), len(text.splitlines()), MAX_FILE_LINES)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            lengths.append((f"{name_of(file)}::{node.name}", length, MAX_FUNCTION_LINES))
    return [f"{name}: {n} lines, at most {limit}" for name, n, limit in lengths if n > limit and name not in LONG]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_opens_with_a_sentence_and_stays_small(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if file.name != "__init__.py" or file.read_text().strip():
        assert docstring, f"{name_of(file)} does not say what it is for"
        first_line = docstring.splitlines()[0]
        assert first_line.endswith((".", ":")) and len(first_line) > 20, f"{name_of(file)}: '{first_line}'"
    assert not too_long(file)


def test_long_files_and_functions_are_still_there() -> None:
    assert {name.partition("::")[0] for name in LONG} <= {name_of(f) for f in FILES}


def test_limits_catch_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "file.py"
    file.write_text("def f():\n" + "    x = 0\n" * MAX_FUNCTION_LINES + "y = 0\n" * MAX_FILE_LINES)
    of_file, of_function = too_long(file)
    assert of_file.startswith("file.py: 461 lines") and of_function.startswith("file.py::f: 61 lines")
    file.write_text(
        "def f():\n" + "    x = 0\n" * (MAX_FUNCTION_LINES - 1) + "y = 0\n" * (MAX_FILE_LINES - MAX_FUNCTION_LINES)
    )
    assert not too_long(file)


def test_every_module_has_a_test_at_the_mirrored_path() -> None:
    without = {name_of(module) for module in MODULES if not mirrored(module).is_file()}
    assert without - set(TESTED_ELSEWHERE) == set(), "add the test, or name the one that covers it in TESTED_ELSEWHERE"
    assert set(TESTED_ELSEWHERE) - without == set(), "these have a test by now, or are gone: take them out"


def test_what_covers_a_module_is_there() -> None:
    named = {reason for reason in TESTED_ELSEWHERE.values() if reason.endswith(".py")}
    assert not [test for test in named if not (ROOT / test).is_file()]
