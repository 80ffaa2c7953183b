"""What a precision means for the parameters."""

import torch

from dsllm.config.precision import has_fp32_parameters
from dsllm.config.train import PRECISIONS
from dsllm.engine.processes.process_group import World
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run


def parameters_are_fp32(world: World) -> dict[str, bool]:
    """By precision, whether the parameters of a real engine are fp32."""
    engines = {
        p: tiny_engine(world, tiny_run(precision=p), 1, device="cuda" if p == "fp16" else "cpu") for p in PRECISIONS
    }
    return {p: all(w.dtype == torch.float32 for w in e.module.parameters()) for p, e in engines.items()}


def test_it_says_what_an_engine_has():
    assert run_ranks(1, parameters_are_fp32)[0] == {p: has_fp32_parameters(p) for p in PRECISIONS}
