"""Damaged, random and hostile run files and overrides: each is refused by name, or loads as a run that can be saved.

Quick: 300 files with damaged bytes, 2,500 changed trees, 200 of them as files, and 1,500 lists of overrides; with the
long tests: 63,000.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsllm.config.load import load_run, run_from_dict, run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.yaml_file import write_yaml
from dsllm.counts import parameter_count
from dsllm.errors import DsllmError
from tests.helpers.fuzz import WORDS, changed, damaged, outcome, places, random_value

TEXT = """\
# a run with every kind of value
run: {name: fuzz, seed: 5, directory: runs/fuzz}
data:
  sources:
    - &one {name: books, kind: files, paths: [books, "more/*.txt"], weight: 2}
    - {<<: *one, name: web, weight: 1.5e0}
  sequence_length: 64
tokenizer: {kind: byte_bpe, vocab_size: 512}
model: {num_layers: 2, hidden_size: 32, num_heads: 4, rope_scaling: {factor: 2.0}}
train:
  total_tokens: 2e6
  precision: auto
  activation_checkpointing: 2
  optimizer: {learning_rate: 1e-3, beta2: .95}
  schedule: {shape: wsd, warmup_steps: 3}
checkpoint: {every_steps: 100}
deepspeed: ds_configs/zero1.json
"""
TREE = yaml.safe_load(TEXT.replace("2e6", "2000000"))
FULL = run_to_dict(run_from_dict(TREE, "full.yaml"))

SCALARS = (
    ".nan",
    "-.inf",
    "2e6",
    "1_000",
    "0o17",
    "[",
    "&a [*a]",
    "!!python/name:os.system",
    "llama-7b",
    "{a: b",
    "'",
    "<<",
)


def check_loaded(run: Any) -> bool:
    """Whether a run was loaded: one that survives being saved, can be counted, and has only finite numbers."""
    if isinstance(run, DsllmError):
        return False
    assert isinstance(run, RunConfig)
    saved = run_to_dict(run)
    assert run_from_dict(saved, "again") == run
    assert all(math.isfinite(v) for v in (_at(saved, p) for p in places(saved)) if isinstance(v, int | float))
    sized = run.model if run.model.vocab_size else RunConfig(run=run.run).model
    if sized.vocab_size:
        assert parameter_count(sized, run.context_length).total > 0
    assert run.num_steps > 0
    return True


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def counts(quick: int, long: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [quick, pytest.param(long, marks=pytest.mark.long)])


@counts(300, 10_000)
def test_damaged_run_files(tmp_path: Path, count: int):
    rng, file, loaded = random.Random(1), tmp_path / "run.yaml", 0
    for _ in range(count):
        content = TEXT.encode()
        for _ in range(rng.choice((1, 1, 2, 5))):
            content = damaged(content, rng)
        file.write_bytes(content)
        loaded += check_loaded(outcome(lambda: load_run(str(file))))
        assert file.read_bytes() == content
    assert count / 50 < loaded < count


@counts(2_500, 30_000)
def test_changed_runs(count: int):
    rng, loaded = random.Random(2), 0
    for _ in range(count):
        tree = changed(rng.choice((TREE, FULL)), rng, rng.choice((1, 1, 2, 4)))
        if isinstance(tree, dict):
            loaded += check_loaded(outcome(lambda tree=tree: run_from_dict(tree, "a checkpoint")))
    assert count / 50 < loaded < count


@counts(200, 3_000)
def test_changed_run_files(tmp_path: Path, count: int):
    rng, file, loaded = random.Random(3), tmp_path / "run.yaml", 0
    for _ in range(count):
        tree = changed(rng.choice((TREE, FULL)), rng, rng.choice((1, 1, 2, 4)))
        file.write_text(write_yaml(tree), encoding="utf-8")
        loaded += check_loaded(outcome(lambda: load_run(str(file))))
    assert count / 50 < loaded < count


@counts(1_500, 20_000)
def test_overrides(tmp_path: Path, count: int):
    rng, file, loaded = random.Random(4), tmp_path / "run.yaml", 0
    file.write_text("model: {num_layers: 2}\n")
    fields = [".".join(map(str, place)) for place in places(FULL) if place]
    for _ in range(count):
        overrides = []
        for _ in range(rng.choice((1, 1, 3))):
            field = (
                rng.choice(fields) if rng.random() < 0.9 else rng.choice((*WORDS, "data.sources.0.0", "run..name", "²"))
            )
            value = rng.choice(
                (json.dumps(random_value(rng)), rng.choice(WORDS), rng.choice(SCALARS), str(rng.randrange(100)))
            )
            overrides.append(f"{field}={value}" if rng.random() < 0.97 else value)
        loaded += check_loaded(outcome(lambda overrides=overrides: load_run(str(file), overrides)))
    assert count / 50 < loaded < count
    assert file.read_text() == "model: {num_layers: 2}\n"
