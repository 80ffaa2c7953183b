"""What the layers can be told reaches them through the engine: documents, and torch.compile, at every ZeRO stage."""

from typing import Any

import pytest
import torch

from dsllm.batches import MicroBatch
from dsllm.config.run import RunConfig
from dsllm.engine.processes.device import check_compiler
from dsllm.engine.processes.process_group import World
from dsllm.engine.step import take_step
from dsllm.errors import ConfigError
from dsllm.model.initial import fill_initial
from dsllm.objectives import TokenLoss
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import SEQUENCE_LENGTH, TABLE, micro_batches, tiny_engine, tiny_model, tiny_run, tiny_step

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 3e-5  # fp32: derived in test_step.py
DOCUMENTS = (torch.arange(SEQUENCE_LENGTH) >= 5).long().expand(2, SEQUENCE_LENGTH)


def step_with_documents(world: World, config: RunConfig) -> list[float]:
    """The first step's loss by ZeRO stage, each sequence holding two documents."""
    found = []
    for stage in (0, 3):
        batches = [
            MicroBatch(inputs=b.inputs, targets=b.targets, documents=DOCUMENTS)
            for b in micro_batches(config, 0, world.data_rank, world.data_size)
        ]
        found.append(take_step(tiny_engine(world, config, stage), batches, TokenLoss(), seed=0).loss)
    return found


def test_documents_reach_the_attention():
    config = tiny_run()
    model = tiny_model(config)
    fill_initial(model, TABLE, config.run.seed)
    (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), 0, 0, 1)
    with torch.no_grad():
        masked = float(model(batch.inputs, batch.targets, documents=DOCUMENTS[:1].expand(8, -1)).losses.mean())
        plain = float(model(batch.inputs, batch.targets).losses.mean())
    assert masked != pytest.approx(plain, rel=10 * LOSS_TOLERANCE)
    for losses in run_ranks(2, step_with_documents, config):
        assert losses == pytest.approx([masked, masked], rel=LOSS_TOLERANCE)


def test_a_missing_compiler_is_named_before_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"train.compile: torch.compile needs a compiler \(no-such-compiler; another one by CXX"
    ):
        check_compiler(torch.device("cpu"))


def compiled_steps(world: World, settings: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    """(loss, norm) of three steps, for each setting and ZeRO stage."""
    found = []
    for stage in (0, 1, 2, 3):
        for setting in settings:
            config = tiny_run(**setting)
            engine = tiny_engine(world, config, stage)
            results = [tiny_step(engine, config, s) for s in range(3)]
            assert not any("_orig_mod" in name for name, _ in engine.module.named_parameters())
            found.append([(r.loss, r.gradient_norm) for r in results])
    return found


@pytest.mark.long  # a minute of compiling
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_layers_equal_eager_ones_at_every_stage(world_size: int):
    settings: list[dict[str, Any]] = [{}]
    settings += [{"compile": True, "activation_checkpointing": what} for what in ("none", "full", "attention")]
    settings += [{"compile": True, "activation_checkpointing": "mlp", "activation_offload": True}]
    found = run_ranks(world_size, compiled_steps, settings, timeout_seconds=900)[0]
    for first in range(0, len(found), len(settings)):
        plain, *compiled = found[first : first + len(settings)]
        for other in compiled:
            assert [x for x, _ in other] == pytest.approx([x for x, _ in plain], rel=LOSS_TOLERANCE)
            assert [x for _, x in other] == pytest.approx([x for _, x in plain], rel=NORM_TOLERANCE)
