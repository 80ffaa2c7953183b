"""What an attempt starts from: the newest sound checkpoint of the run, or the first state of a new run. Reads only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsllm.config.run import RunConfig
from dsllm.data.manifest import FILE_NAME as DATA_MANIFEST
from dsllm.engine.processes.process_group import World
from dsllm.files import sha256_of_file
from dsllm.session.agreement import on_rank_0
from dsllm.session.first_state import first_state
from dsllm.session.progress import Progress
from dsllm.session.resume import (
    Report,
    check_counts,
    check_data,
    check_same_run,
    check_unsaved_run,
    find_resumable,
    progress_of,
    saved_run,
)
from dsllm.slices import StateReader


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the attempt starts from."""

    state: StateReader
    loss_scaler: Mapping[str, float]
    """State of fp16's loss scale; empty in a new run."""
    progress: Progress
    damaged: Sequence[Path] = ()
    """Newer checkpoints that were skipped."""


def find_start(config: RunConfig, world: World, report: Report) -> Start:
    """The newest sound checkpoint of the run, or its first state; reads only. A collective call."""
    directory = Path(config.run.directory)
    data_sha256 = sha256_of_file(Path(config.data.directory or "") / DATA_MANIFEST)
    reader, damaged = find_resumable(directory, world, report)
    if reader is None:
        on_rank_0(world, lambda: check_unsaved_run(directory, config, report))
        state = first_state(config, world, report)
        return Start(state=state, loss_scaler={}, progress=Progress(data_sha256=data_sha256))
    check_same_run(saved_run(reader), config, reader.folder, report)
    progress = progress_of(reader, config)
    check_counts(progress, config, reader.folder)
    check_data(progress, data_sha256, config, reader.folder)
    report(f"resuming {reader.folder}: step {progress.step:,}, {progress.tokens:,} tokens")
    scaler = reader.manifest.engine["loss_scaler"]
    return Start(state=reader, loss_scaler=scaler, progress=progress, damaged=damaged)
