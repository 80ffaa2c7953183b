"""What starting an engine imports, and what it leaves out."""

import subprocess
import sys
from unittest import mock

from dsllm.engine.processes.process_group import World
from dsllm.train import loop
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run, tiny_step

SLOW = ("torch._inductor.compile_fx", "matplotlib.figure", "transformers", "datasets", "pandas")
"""Each takes half a second or more."""


def slow_modules(world: World, stage: int) -> list[str]:
    """Those that a step has loaded, and the loop that takes it in a run."""
    assert callable(loop.train)
    engine = tiny_engine(world, config := tiny_run(precision="fp32"), stage)
    tiny_step(engine, config, 0)
    return [name for name in SLOW if name in sys.modules]


def test_a_first_step_loads_neither_the_compiler_nor_what_draws():
    for stage in (0, 1, 3):
        assert run_ranks(1, slow_modules, stage) == [[]]


def processes_started(world: World) -> int:
    """By a step after the first one."""
    engine = tiny_engine(world, config := tiny_run(precision="fp32"), 3)
    tiny_step(engine, config, 0)
    with mock.patch.object(subprocess, "Popen", side_effect=FileNotFoundError) as started:  # as without that program
        tiny_step(engine, config, 1)
    return started.call_count


def test_a_step_starts_no_process():
    """DeepSpeed 0.19.8 runs `numactl` for each bucket of gradients that ZeRO-3 reduces."""
    assert run_ranks(2, processes_started) == [0, 0]
