"""Opens a run: first checks everything without writing, then locks the directory and builds the engine."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.run import RunConfig
from dsllm.data.manifest import Manifest, check_shards
from dsllm.data.training import TrainingBatches
from dsllm.engine.build import Engine
from dsllm.engine.nvme import check_nvme, swap_files
from dsllm.engine.processes.cores import Cores
from dsllm.engine.processes.device import set_up_process
from dsllm.engine.processes.process_group import World, lost_ranks_named, process_group
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.state import load_loss_scaler_state
from dsllm.session.agreement import on_every_rank, stop_together
from dsllm.session.assembly import ready_engine
from dsllm.session.directory import HeldDirectory, free_directory_state, held_directory
from dsllm.session.machine import in_saved_precision, run_on_machine
from dsllm.session.progress import Progress
from dsllm.session.record import RunRecord
from dsllm.session.resume import Report, check_delivery, clean_up
from dsllm.session.start import find_start
from dsllm.session.verification import Verification, open_verification


@dataclass(frozen=True, kw_only=True)
class Caller:
    """What a session asks of the command that opens it."""

    report: Report
    """Prints a line on rank 0; silent on the other ranks."""
    preflight: Callable[[Progress], None] = lambda progress: None
    """Its own checks: raises before anything is written if this attempt cannot work."""
    why_stop: Callable[[], str] = lambda: ""
    """Why this rank was asked to stop (empty: it was not); asked while the run opens, and agreed on by all ranks."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run that is ready to take steps: its directory held, its engine loaded, its data open."""

    config: RunConfig
    """The resolved run: its precision is the one in use."""
    manifest: Manifest
    """Describes the prepared data."""
    engine: Engine
    batches: TrainingBatches
    verification: Verification
    """Compares the token shards with their checksums."""
    progress: Progress
    """How far the run was when it was opened."""
    directory: HeldDirectory
    record: RunRecord
    saved: RunConfig | None
    """The run as its last attempt had it; None: it has no checkpoint yet."""
    damaged: Sequence[Path]
    """Damaged checkpoints that were skipped; removed once a new one is published."""
    cores: Cores
    """The cores that this rank computes on."""
    report: Report
    """Prints a line on rank 0; silent on the other ranks."""

    @property
    def world(self) -> World:
        """The ranks of the job."""
        return self.engine.world


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that has trained on all of its tokens."""

    directory: Path
    progress: Progress


@contextlib.contextmanager
def open_session(
    config: RunConfig, given: Mapping[str, Any], manifest: Manifest, ranks: Ranks, caller: Caller
) -> Iterator[Session | FinishedRun]:
    """Open a run on this rank; a collective call.

    Args:
        config: the vocabulary resolved
        given: the DeepSpeed JSON that the run names
        manifest: of the prepared data in data.directory

    Raises:
        DsllmError: the run is refused; the directory is as it was.
        Interrupted: a rank was asked to stop; nothing is saved.
    """
    report, why_stop = caller.report, caller.why_stop
    cores = set_up_process(ranks.local_size, ranks.local_rank, config.train.bind_cores)
    run = run_on_machine(config, given, ranks)
    directory, timeout = Path(config.run.directory), timedelta(minutes=config.train.timeout_minutes)
    with process_group(ranks, run.device, run.layout.mesh, timeout, why_stop) as world, lost_ranks_named(world):
        stop_if_asked = partial(stop_together, world, why_stop)
        stop_if_asked()
        final = run.final_config(world)
        state = free_directory_state(directory, world, report)
        on_every_rank(world, lambda: check_shards(Path(config.data.directory or ""), manifest, world.rank, world.size))
        start = find_start(config, run.layout.precision, world, report)
        if start.precision != run.layout.precision:  # the run began on another device
            run, final = in_saved_precision(run, start.precision, world, report)
        config, precision = run.config, run.layout.precision
        caller.preflight(start.progress)
        stop_if_asked()
        if start.progress.step >= config.num_steps:
            yield _finished(directory, start.progress, state, world, report)
            return
        on_every_rank(world, lambda: check_nvme(final, _num_parameters(config), precision, ranks))
        batches = _training_batches(config, manifest, world)
        check_delivery(start.progress, batches, world)
        verification = open_verification(directory, batches, start.progress, world, report, stop_if_asked)
        with (
            held_directory(directory, world, report, step=start.progress.step, tokens=start.progress.tokens) as held,
            swap_files(final, ranks),
            lost_ranks_named(world),  # inside, so that status.json gets its message too
        ):
            stop_if_asked()
            clean_up(directory, world)
            engine = ready_engine(config, final, precision, world, start.state)
            load_loss_scaler_state(engine, start.loss_scaler)
            yield Session(
                config=config,
                manifest=manifest,
                engine=engine,
                batches=batches,
                verification=verification,
                progress=start.progress,
                directory=held,
                record=RunRecord(config=config, deepspeed=final, tokenizer_sha256=manifest.tokenizer.sha256),
                saved=start.saved,
                damaged=start.damaged,
                cores=cores,
                report=report,
            )


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


def _finished(directory: Path, progress: Progress, state: str, world: World, report: Report) -> FinishedRun:
    """The finished run, after its status says so."""
    if state != "finished":  # it was killed before it could write so
        with held_directory(directory, world, report) as held:
            clean_up(directory, world)  # it may have been killed while it removed an older checkpoint
            held.write_status("finished", step=progress.step, tokens=progress.tokens)
    return FinishedRun(directory=directory, progress=progress)
