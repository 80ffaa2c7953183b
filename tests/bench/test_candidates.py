"""Every command of the bench starts a program that is there and understands it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import recipe
from bench.candidates import BARS, BASE, GROUPS, ROOT
from bench.gpu import checks, speed
from bench.turns import Candidate
from bench.workloads import WORKLOADS
from dsllm import counts
from dsllm.batches import MicroBatch
from dsllm.cli.train import _parse
from dsllm.cli.words import parse_run_words
from dsllm.config.load import load_run
from dsllm.config.run import RunConfig
from dsllm.engine.settings.final_config import final_config, gradient_accumulation
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.mesh import Mesh
from dsllm.objectives import TokenLoss
from tests.helpers.ranks import run_ranks


def all_candidates(folder: Path) -> Iterator[Candidate]:
    for _, make in GROUPS.values():
        yield from make(folder)
    for make, _ in recipe.GROUPS.values():
        yield from make(folder)
    for size in ("125m", "350m", "1.3b"):
        for name, command in speed.candidates(size, folder, gpu=True).items():
            yield Candidate(name=name, command=command)


def run_of(words: tuple[str, ...]) -> RunConfig:
    """The run that a command starts, as `dsllm train` reads it."""
    options = _parse(words[words.index("launch/pretrain.py") + 1 :])
    run = parse_run_words(options.words, *([options.config] if options.config else []))
    return load_run(run.file, run.overrides)


def test_every_program_is_there(tmp_path: Path) -> None:
    for candidate in all_candidates(tmp_path):
        words = candidate.command
        if "launch/pretrain.py" in words:
            continue
        flag = "--module" if "--module" in words else "-m"
        program = words[len(words) - 1 - words[::-1].index(flag) + 1]
        assert importlib.util.find_spec(program), candidate.name
        assert program.startswith("bench.peers.")
        if "--workload" in words:
            assert words[words.index("--workload") + 1] in WORKLOADS


def test_every_dsllm_command_is_a_run_of_its_workload(tmp_path: Path) -> None:
    for group, (workload, make) in GROUPS.items():
        for candidate in make(tmp_path):
            if not candidate.name.startswith("dsllm"):
                continue
            config = run_of(candidate.command)
            assert config.tokens_per_step == WORKLOADS[workload].tokens_per_step, group
            assert gradient_accumulation(config, candidate.num_ranks) == 1
            stage = read_deepspeed_json(config.deepspeed)["zero_optimization"]["stage"]
            assert candidate.name.startswith(f"dsllm, ZeRO-{stage}")


@pytest.mark.parametrize("size", WORKLOADS)
def test_flops_of_a_workload_are_those_of_dsllm(size: str, tmp_path: Path) -> None:
    shape = WORKLOADS[size]
    words = ("launch/pretrain.py", "--config", "bench/recipes/workload.yaml", *shape.dsllm_overrides(1))
    config = run_of(words)
    assert shape.flops_per_token == counts.flops_per_token(config.model, config.data.sequence_length)


def test_sizes_are_what_they_are_called() -> None:
    for size, millions in {"a": 20.45, "b": 124.4, "125m": 125, "350m": 350, "1.3b": 1300}.items():
        words = ("launch/pretrain.py", "--config", "bench/recipes/workload.yaml", *WORKLOADS[size].dsllm_overrides(1))
        config = run_of(words)
        count = counts.parameter_count(config.model, config.context_length).total
        assert count == pytest.approx(millions * 1e6, rel=0.08 if size not in "ab" else 0.001), size


def test_names_are_unique_and_the_base_comes_first(tmp_path: Path) -> None:
    for group, (_, make) in GROUPS.items():
        names = [candidate.name for candidate in make(tmp_path)]
        assert names[0] == BASE and len(set(names)) == len(names), group
        assert {bar.candidate for bar in BARS if bar.group == group} <= set(names)
        assert {bar.against for bar in BARS if bar.group == group} <= set(names)
    assert {bar.group for bar in BARS} <= GROUPS.keys()


def test_every_gpu_check_is_a_run_that_dsllm_accepts_there() -> None:
    names = [check.name for check in checks.CHECKS]
    assert len(set(names)) == len(names)
    for check in checks.CHECKS:
        words = ("launch/pretrain.py", "--config", "bench/recipes/workload.yaml", *checks.SHAPE, *check.words.split())
        config = run_of(words)
        assert config.num_steps == checks.NUM_STEPS
        precision = config.train.precision
        assert precision != "auto" and (not check.like or check.like in names)
        layout = Layout(mesh=Mesh(data=1), device="cuda", precision=precision)
        assert final_config(config, read_deepspeed_json(config.deepspeed), layout)


def test_a_gpu_check_sees_a_wrong_gradient_that_the_loss_hides() -> None:
    right = [{"loss": 9.0 - step / 10, "gradient_norm": 2.0} for step in range(checks.NUM_STEPS)]
    assert checks.follows(right, [dict(row, loss=row["loss"] + 0.005) for row in right])[0]
    assert not checks.follows(right, [dict(row, gradient_norm=4.0) for row in right])[0]
    assert not checks.follows(right, [dict(row, loss=row["loss"] + 0.1) for row in right])[0]
    assert not checks.follows(right, right[:-1])[0]


def loss_with_a_patch(world: object, names: tuple[str, ...]) -> tuple[float, float]:
    import torch

    from bench.peers import recipe_loop
    from bench.peers.dsllm_engine import build
    from dsllm.engine.step import take_step

    for name in names:
        recipe_loop.PATCHES[name]()
    engine = build(WORKLOADS["tiny"], world, 0, "fp32" if "precision" in names else "fp32_compute_bf16")
    tokens = torch.randint(8192, (2, 65), generator=torch.Generator().manual_seed(1))
    result = take_step(engine, [MicroBatch(inputs=tokens[:, :-1], targets=tokens[:, 1:])], TokenLoss(), seed=1)
    return result.loss, result.gradient_norm


@pytest.mark.slow
def test_the_recipe_without_an_element_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    from bench.peers import recipe_loop

    assert set(recipe.ELEMENTS) == set(recipe_loop.ELEMENTS)
    loss, norm = run_ranks(1, loss_with_a_patch, ())[0]
    for names in (("attention",), ("loss",), ("precision",), ("attention", "loss", "precision")):
        other_loss, other_norm = run_ranks(1, loss_with_a_patch, names)[0]
        # bf16 keeps 8 bits: one rounding is 0.4 %, and the mean over 128 tokens hides most of it
        assert other_loss == pytest.approx(loss, rel=1e-3), names
        assert other_norm == pytest.approx(norm, rel=2e-2), names
        assert (other_loss, other_norm) != (loss, norm), f"{names}: nothing was replaced"
