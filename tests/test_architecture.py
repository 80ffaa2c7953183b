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
    "dsllm/batches.py": "nothing uses it yet",
    "dsllm/checkpoint/find.py": "tests/checkpoint/test_checkpoint.py",
    "dsllm/checkpoint/hugging_face_config.py": "tests/checkpoint/test_hugging_face.py",
    "dsllm/checkpoint/hugging_face_export.py": "tests/checkpoint/test_hugging_face.py",
    "dsllm/checkpoint/hugging_face_names.py": "tests/checkpoint/test_hugging_face.py",
    "dsllm/checkpoint/manifest.py": "tests/checkpoint/test_checkpoint.py",
    "dsllm/checkpoint/read.py": "tests/checkpoint/test_checkpoint.py",
    "dsllm/checkpoint/write.py": "tests/checkpoint/test_checkpoint.py",
    "dsllm/cli/doctor_report.py": "tests/cli/test_doctor.py",
    "dsllm/cli/dry_run.py": "tests/cli/test_main.py",
    "dsllm/cli/evaluate.py": "tests/cli/test_saved_models.py",
    "dsllm/cli/export.py": "tests/cli/test_saved_models.py",
    "dsllm/cli/generate.py": "tests/cli/test_saved_models.py",
    "dsllm/cli/inside.py": "tests/cli/test_train.py",
    "dsllm/cli/training.py": "tests/cli/test_train.py",
    "dsllm/config/check.py": "tests/config/test_load.py",
    "dsllm/config/check_cluster.py": "tests/config/test_cluster.py",
    "dsllm/config/data.py": "tests/config/test_load.py",
    "dsllm/config/explain.py": "tests/config/test_load.py",
    "dsllm/config/fields.py": "tests/config/test_load.py",
    "dsllm/config/hostfile.py": "tests/config/test_cluster.py",
    "dsllm/config/load_cluster.py": "tests/config/test_cluster.py",
    "dsllm/config/model.py": "tests/config/test_load.py",
    "dsllm/config/parallel.py": "nothing uses it yet",
    "dsllm/config/paths.py": "tests/test_shipped_configs.py",
    "dsllm/config/run.py": "tests/config/test_load.py",
    "dsllm/config/train.py": "tests/config/test_load.py",
    "dsllm/config/yaml_file.py": "tests/config/test_load.py",
    "dsllm/data/stream.py": "tests/data/test_loader.py",
    "dsllm/doctor/alone.py": "tests/cli/test_doctor.py",
    "dsllm/doctor/gpus.py": "tests/cli/test_doctor.py",
    "dsllm/doctor/operators.py": "tests/cli/test_doctor.py",
    "dsllm/engine/build.py": "tests/engine/test_step.py",
    "dsllm/engine/deepspeed_library.py": "tests/engine/test_known_traps.py",
    "dsllm/engine/instruments/fp16_on_cpu.py": "tests/engine/test_step.py",
    "dsllm/engine/processes/device.py": "tests/engine/test_layers.py",
    "dsllm/engine/processes/process_group.py": "tests/engine/test_known_traps.py",
    "dsllm/engine/settings/gradients.py": "tests/engine/settings/test_final_config.py",
    "dsllm/engine/settings/layout.py": "tests/engine/settings/test_final_config.py",
    "dsllm/engine/settings/precision.py": "tests/engine/settings/test_final_config.py",
    "dsllm/engine/state.py": "tests/engine/test_known_traps.py",
    "dsllm/engine/wrappers/skipped_step.py": "tests/engine/test_step.py",
    "dsllm/engine/wrappers/swap.py": "tests/cli/test_train_offload.py",
    "dsllm/errors.py": "tests/cli/test_main.py",
    "dsllm/files.py": "tests/train/test_run_directory.py",
    "dsllm/launch/batch.py": "tests/cli/test_launch.py",
    "dsllm/launch/job.py": "tests/launch/test_templates.py",
    "dsllm/launch/marked.py": "tests/launch/test_node.py",
    "dsllm/launch/mpi.py": "tests/launch/test_templates.py",
    "dsllm/launch/plan.py": "tests/launch/test_templates.py",
    "dsllm/mesh.py": "nothing uses it yet",
    "dsllm/model/block_causal.py": "tests/model/test_attention.py",
    "dsllm/model/initial_state.py": "tests/engine/test_memory.py",
    "dsllm/objectives.py": "nothing uses it yet",
    "dsllm/parameters.py": "nothing uses it yet",
    "dsllm/parity/bounds.py": "tests/parity/test_table.py",
    "dsllm/parity/combinations.py": "tests/parity/test_cover.py",
    "dsllm/parity/compare.py": "tests/parity/test_table.py",
    "dsllm/parity/engine_run.py": "tests/parity/test_table.py",
    "dsllm/parity/reference.py": "tests/parity/test_table.py",
    "dsllm/parity/report.py": "tests/parity/test_table.py",
    "dsllm/parity/tiny_run.py": "tests/parity/test_cover.py",
    "dsllm/prepare/card.py": "tests/prepare/test_pipeline.py",
    "dsllm/prepare/document.py": "tests/prepare/test_reading.py",
    "dsllm/prepare/train_tokenizer.py": "tests/prepare/test_pipeline.py",
    "dsllm/prepare/units.py": "tests/prepare/test_reading.py",
    "dsllm/prepare/workspace.py": "tests/prepare/test_pipeline.py",
    "dsllm/slices.py": "tests/checkpoint/test_checkpoint.py",
    "dsllm/train/interrupt.py": "tests/cli/test_train.py",
    "dsllm/train/loop.py": "tests/cli/test_train.py",
    "dsllm/train/metrics.py": "tests/cli/test_train.py",
    "dsllm/train/picture.py": "tests/train/test_run_directory.py",
    "dsllm/train/progress.py": "tests/train/test_saving.py",
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
