"""What a notebook calls to train: a run's engine and its step. These names load DeepSpeed, so `dsllm` imports them last."""

import contextlib
from collections.abc import Iterator

from dsllm.api import with_vocabulary
from dsllm.config.run import RunConfig
from dsllm.engine.build import Engine
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import process_group
from dsllm.engine.processes.ranks import discover_ranks
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.step import StepResult, take_step
from dsllm.session.assembly import ready_engine
from dsllm.session.machine import run_on_machine
from dsllm.slices import StateReader

__all__ = ["Engine", "StepResult", "open_engine", "set_learning_rate", "take_step"]


@contextlib.contextmanager
def open_engine(run: RunConfig, state: StateReader | None = None) -> Iterator[Engine]:
    """The run's engine on the ranks of this job: one in a notebook, several under a launcher.

    Args:
        state: what the engine starts from, such as a CheckpointReader. None (default): the initial values.

    Raises:
        DsllmError: the run does not fit this machine or these ranks, or the state cannot be loaded.
    """
    ranks = discover_ranks()
    prepared = run_on_machine(with_vocabulary(run), read_deepspeed_json(run.deepspeed), ranks)
    with process_group(ranks, prepared.device, prepared.layout.mesh) as world:
        final = prepared.final_config(world)
        yield ready_engine(prepared.config, final, prepared.layout.precision, world, state)
