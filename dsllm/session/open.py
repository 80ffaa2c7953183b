"""Opens a run: everything that is refused is refused before anything is written; then a ready engine, its data and progress."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.run import RunConfig
from dsllm.data.manifest import Manifest, check_shards
from dsllm.data.training import TrainingBatches
from dsllm.engine.build import Engine
from dsllm.engine.nvme import swap_files
from dsllm.engine.processes.cores import Cores
from dsllm.engine.processes.device import set_up_process
from dsllm.engine.processes.process_group import World, lost_ranks_named, process_group
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.state import load_loss_scaler_state
from dsllm.errors import DataError
from dsllm.run_directory import read_status, refuse_live_run
from dsllm.session.assembly import ready_engine
from dsllm.session.directory import HeldDirectory, held_directory
from dsllm.session.machine import run_on_machine
from dsllm.session.progress import Progress
from dsllm.session.record import RunRecord
from dsllm.session.resume import (
    Report,
    check_delivery,
    clean_up,
)
from dsllm.session.start import find_start

Preflight = Callable[[Progress], None]
"""A caller's own checks: raises before anything is written if this attempt cannot work."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run that is ready to take steps: its directory held, its engine loaded, its data open."""

    config: RunConfig
    """The resolved run: its precision is the one in use."""
    manifest: Manifest
    """Of the prepared data."""
    engine: Engine
    batches: TrainingBatches
    progress: Progress
    """How far the run was when it was opened."""
    directory: HeldDirectory
    record: RunRecord
    damaged: Sequence[Path]
    """Damaged checkpoints that were skipped; removed once a new one is published."""
    cores: Cores
    """What this rank computes on."""
    report: Report
    """Prints a line on rank 0; silent on the other ranks."""

    @property
    def world(self) -> World:
        """The ranks of the job."""
        return self.engine.world


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run whose token budget is spent: there is nothing left to train."""

    directory: Path
    progress: Progress


@contextlib.contextmanager
def open_session(
    config: RunConfig,
    given: Mapping[str, Any],
    manifest: Manifest,
    ranks: Ranks,
    report: Report,
    preflight: Preflight = lambda progress: None,
) -> Iterator[Session | FinishedRun]:
    """Open a run on this rank; a collective call.

    Args:
        config: the vocabulary resolved
        given: the DeepSpeed JSON that the run names
        manifest: of the prepared data in data.directory

    Raises:
        DsllmError: the run is refused; then nothing was written, locked or removed.
    """
    cores = set_up_process(ranks.local_size, ranks.local_rank, config.train.bind_cores)
    run = run_on_machine(config, given, ranks)
    config, precision = run.config, run.layout.precision
    directory, timeout = Path(config.run.directory), timedelta(minutes=config.train.timeout_minutes)
    with process_group(ranks, run.device, run.layout.mesh, timeout) as world, lost_ranks_named(world):
        final = run.final_config(world)
        refuse_live_run(directory)
        _check_shards(config, manifest, world)
        start = find_start(config, world, report)
        preflight(start.progress)
        if start.progress.step >= config.num_steps:
            _set_finished(directory, start.progress, world, report)
            yield FinishedRun(directory=directory, progress=start.progress)
            return
        with (
            swap_files(final, _num_parameters(config), precision, ranks),
            held_directory(directory, world, report) as held,
            lost_ranks_named(world),  # inside, so that status.json gets its message too
        ):
            clean_up(directory, world)
            engine = ready_engine(config, final, precision, world, start.state)
            load_loss_scaler_state(engine, start.loss_scaler)
            batches = _training_batches(config, manifest, world)
            check_delivery(start.progress, batches, world)
            yield Session(
                config=config,
                manifest=manifest,
                engine=engine,
                batches=batches,
                progress=start.progress,
                directory=held,
                record=RunRecord(config=config, deepspeed=final),
                damaged=start.damaged,
                cores=cores,
                report=report,
            )


def _check_shards(config: RunConfig, manifest: Manifest, world: World) -> None:
    """Check the token shards, each on one rank; all ranks raise if one of them finds a problem. A collective call."""
    problem = ""
    try:
        check_shards(Path(config.data.directory or ""), manifest, world.rank, world.size)
    except DataError as error:
        problem = str(error)
    problems = [text for text in world.gather(problem) if text]
    if problems:
        raise DataError("\n".join(problems))


def _training_batches(config: RunConfig, manifest: Manifest, world: World) -> TrainingBatches:
    return TrainingBatches(
        Path(config.data.directory or ""),
        manifest,
        config.data,
        seed=config.run.seed,
        global_batch_sequences=config.train.global_batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        data_rank=world.data_rank,
        data_size=world.data_size,
    )


def _num_parameters(config: RunConfig) -> int:
    return counts.parameter_count(config.model, config.context_length).total


def _set_finished(directory: Path, progress: Progress, world: World, report: Report) -> None:
    """Write the status of a finished run that was killed before it could."""
    if world.send_from_rank_0(read_status(directory).get("state")) != "finished":
        with held_directory(directory, world, report) as held:
            held.write_status("finished", step=progress.step, tokens=progress.tokens)
