"""Saves and restores a run's state: this rank's slices to and from the checkpoints of the run directory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm.checkpoint.find import CHECKPOINTS, newest_sound, retire
from dsllm.checkpoint.manifest import CheckpointManifest
from dsllm.checkpoint.read import CheckpointReader, damage_in
from dsllm.checkpoint.write import (
    checkpoint_name,
    discard_checkpoint,
    merge_parameters,
    publish_checkpoint,
    start_checkpoint,
    write_slices,
)
from dsllm.config.compare import differences
from dsllm.config.run import RunConfig
from dsllm.config.train import CheckpointConfig
from dsllm.engine.build import Engine
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_loss_scaler_state, load_state, loss_scaler_state, owned_slices
from dsllm.errors import CheckpointError
from dsllm.train.progress import Progress


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What goes into every checkpoint beside tensors and progress."""

    config: Mapping[str, Any]
    """The resolved run."""
    deepspeed: Mapping[str, Any]
    """The final DeepSpeed config."""
    versions: Mapping[str, str]
    """Libraries in use."""


def save_checkpoint(
    engine: Engine, progress: Progress, record: RunRecord, directory: Path, keep: CheckpointConfig
) -> Path:
    """Save the run's state as RUN/checkpoints/step-N; a collective call. Old checkpoints are retired afterwards.

    Raises:
        CheckpointError: on all ranks, if any of them could not write; nothing half-written is left, older ones stay.
    """
    world, checkpoints = engine.world, directory / CHECKPOINTS
    final = checkpoints / checkpoint_name(progress.step)
    aside = _on_rank_0(world, lambda: start_checkpoint(checkpoints, progress.step))
    written, problem = None, None
    try:
        written = write_slices(Path(aside), world.rank, owned_slices(engine))
    except CheckpointError as error:
        problem = str(error)
    answers = world.gather((written, problem))
    problems = [p for _, p in answers if p]

    def publish() -> None:
        if problems:
            discard_checkpoint(Path(aside))
            raise CheckpointError("; ".join(problems))
        manifest = CheckpointManifest(
            progress=progress.to_dict(),
            engine={
                "stage": engine.stage,
                "precision": engine.precision,
                "world_size": world.size,
                "loss_scaler": loss_scaler_state(engine),
            },
            config=dict(record.config),
            deepspeed=dict(record.deepspeed),
            versions=dict(record.versions),
            parameters=merge_parameters([w[1] for w, _ in answers]),
            files=[w[0] for w, _ in answers],
        )
        try:
            publish_checkpoint(Path(aside), final, manifest)
        except CheckpointError:
            discard_checkpoint(Path(aside))
            raise
        retire(checkpoints, keep.keep_last, keep.keep_every_steps)

    _on_rank_0(world, publish)
    return final


def _on_rank_0(world: World, action: Callable[[], Any]) -> Any:
    """Do something on rank 0; its value on every rank, and its failure on every rank too."""
    value, problem = None, None
    if world.rank == 0:
        try:
            value = action()
        except (CheckpointError, OSError) as error:
            problem = str(error)
    value, problem = world.gather((value, problem))[0]
    if problem:
        raise CheckpointError(f"the run's state could not be saved: {problem}")
    return value


def find_resumable(directory: Path, world: World, tell: Callable[[str], None]) -> CheckpointReader | None:
    """The newest checkpoint of a run that verifies, or None where the run has none; a collective call.

    The ranks share the reading, and agree on the answer.
    """

    def damage(folder: Path) -> str | None:
        answers = world.gather(damage_in(folder, world.rank, world.size))
        return next((a for a in answers if a), None)

    found = newest_sound(directory / CHECKPOINTS, tell, damage)
    return None if found is None else CheckpointReader(found)


def check_same_run(saved: RunConfig, asked: RunConfig, where: Path, tell: Callable[[str], None]) -> None:
    """Resume or refuse: what may change is told, any other difference ends the attempt.

    Raises:
        CheckpointError: lists what differs, and how to start a new run from the checkpoint.
    """
    found = differences(saved, asked)
    refused = [d for d in found if not d.changeable]
    if refused:
        raise CheckpointError(
            f"{where} belongs to a run that differs in:\n"
            + "\n".join(f"- {d}" for d in refused)
            + f"\nTo go on with that run, take these back. To start a new run from its weights, set another run.directory and "
            f"model.init_from={where}"
        )
    for difference in found:
        tell(f"changed since the last attempt: {difference}")


def restore(engine: Engine, reader: CheckpointReader) -> Progress:
    """Load weights, moments, loss scale and counters; a collective call."""
    load_state(engine, reader)
    load_loss_scaler_state(engine, reader.manifest.engine["loss_scaler"])
    return Progress(**reader.manifest.progress)
