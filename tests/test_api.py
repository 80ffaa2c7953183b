"""The public names: lazy, typed where they are defined, and the example in docs/api.md runs as it is written."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsllm
from dsllm import api
from dsllm.errors import ConfigError, DataError
from dsllm.parameters import parameter_table
from tests.helpers.saved_run import prepare_golden

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PUBLIC = [name for name in dsllm.__all__ if name != "__version__"]


def types_shown() -> dict[str, str]:
    """Each public name and the module that editors and type checkers find it in."""
    tree = ast.parse((ROOT / "dsllm" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def loaded_by(code: str) -> set[str]:
    """Which of the large libraries a piece of code loads."""
    large = ("torch", "deepspeed", "numpy", "transformers", "pydantic")
    code = f"import sys\n{code}\nprint(*[name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_type_checkers_and_the_program_find_the_same_thing_under_every_name():
    shown = types_shown()
    assert set(shown) == set(PUBLIC)
    for name, module in shown.items():
        assert getattr(dsllm, name) is getattr(importlib.import_module(module), name), name
    assert set(dsllm.__all__) <= set(dir(dsllm)) and set(api.__all__) <= set(PUBLIC)


def test_the_page_explains_every_name():
    assert not [name for name in PUBLIC if f"`{name}" not in PAGE and f"`dsllm.{name}`" not in PAGE]


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dsllm' has no attribute 'load_rum'"):
        dsllm.load_rum  # noqa: B018


def test_the_package_loads_nothing_large_and_the_config_no_torch():
    assert loaded_by("import dsllm; dsllm.__version__, dir(dsllm)") == set()
    without_torch = "dsllm.load_run, dsllm.parameter_table, dsllm.MicroBatch, dsllm.make_mesh, dsllm.DsllmError"
    assert loaded_by(f"import dsllm; {without_torch}") <= {"pydantic"}
    assert "deepspeed" not in loaded_by("import dsllm; dsllm.build_model, dsllm.load_model")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dsllm.RunConfig:
    """A run whose vocabulary is left to the tokenizer, with its data."""
    config = prepare_golden(tmp_path_factory.mktemp("api"))
    directory = config.data.directory
    return dsllm.load_run(None, [f"data.directory={directory}", "data.sequence_length=32", "train.global_batch_sequences=8",
                                 "train.micro_batch_sequences=2", "data.sources=[{name: golden, paths: [x]}]",
                                 "model={num_layers: 1, hidden_size: 32, num_heads: 2}"])  # fmt: skip


def test_a_model_has_the_parameters_of_the_table_and_the_initial_values_of_the_seed(run):
    model, again = dsllm.build_model(run), dsllm.build_model(run)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {row.name: row.shape for row in parameter_table(model.config, 32)}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="only the engine trains in it"):
        dsllm.build_model(run, "bf16")


def test_the_ranks_divide_the_batches_of_one_rank(run):
    def tokens(rank: int, num_ranks: int) -> torch.Tensor:
        batches = dsllm.training_batches(run, rank, num_ranks).step(dsllm.Position(3 * 8))
        return torch.cat([batch.inputs for batch in batches])

    assert torch.equal(torch.cat([tokens(0, 2), tokens(1, 2)]), tokens(0, 1))
    with pytest.raises(ConfigError, match="8 is not a multiple of 2 sequences x 3 ranks"):
        dsllm.training_batches(run, 0, 3)


def test_data_that_is_not_prepared_is_an_error_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (dsllm.build_model, dsllm.training_batches, dsllm.validation_batches):
        with pytest.raises(DataError, match="dsllm prepare"):
            call(dsllm.load_run(None))


@pytest.mark.slow
def test_the_example_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (yaml,) = blocks("yaml")
    (tmp_path / "tiny.yaml").write_text(yaml)
    for line in "".join(blocks("bash")).splitlines():
        name, *words = shlex.split(line)
        assert name == "dsllm"
        subprocess.run([sys.executable, "-m", "dsllm", *words], check=True, capture_output=True, timeout=200)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/api.md", "exec"), names)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    shown = [float(number) for number in re.findall(r"([\d.]+) nats per token", capsys.readouterr().out)]
    by_hand, by_engine, trained = shown
    # the trained model, read from its checkpoint, has the held-out loss that training measured; the others had fewer steps
    assert trained == pytest.approx(rows[-1]["validation_loss"], abs=2e-3)
    assert trained < by_hand < 6.3 and trained < by_engine < 6.3
    assert torch.equal(names["embedding"], names["trained"].embed.weight)
