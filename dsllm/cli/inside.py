"""What a run shows of its inside: the breakdown of its steps, and its profile beside the formulas."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.run import RunConfig
from dsllm.engine.build import Engine
from dsllm.engine.instruments.step_timer import watching
from dsllm.engine.processes.process_group import World
from dsllm.parameters import parameter_table
from dsllm.train.breakdown import Breakdown, table
from dsllm.train.profile import FOLDER, Expected, Profile, steps_to_profile

Tell = Callable[[str], None]


@contextmanager
def breakdown_of(config: RunConfig, world: World, tell: Tell) -> Iterator[Breakdown]:
    """The breakdown of the steps in the block, told as a table at its end; a collective call."""
    asked = config.log.breakdown
    # on CPUs it costs next to nothing; on GPUs the device is waited for
    with watching(world.device, world.device.type == "cpu" if asked is None else asked) as watch:
        breakdown = Breakdown(watch)
        yield breakdown
    if watch.on:
        tell(table(world.gather(breakdown.means())))


def profile_of(
    config: RunConfig, final: Mapping[str, Any], engine: Engine, asked: str | None, steps_done: int, tell: Tell
) -> Profile:
    """The profile that is asked for (None: no steps; empty: some steps after a warm-up), with what the formulas expect."""
    per_token = counts.flops_per_token(config.model, config.data.sequence_length)
    table = parameter_table(config.model, config.context_length)
    return Profile(
        steps=None if asked is None else steps_to_profile(asked, steps_done, config.num_steps),
        folder=Path(config.run.directory) / FOLDER,
        rank=engine.world.rank,
        expected=Expected(
            flops=per_token * config.tokens_per_step / engine.world.size,
            communication=counts.communication_of_step(table, final, engine.precision),
            ranks=engine.world.size,
            compiled=config.train.compile,
        ),
        tell=tell,
    )
