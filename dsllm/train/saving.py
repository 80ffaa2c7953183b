"""Saves and restores a run's state: this rank's slices to and from the checkpoints of the run directory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm.checkpoint.find import (
    CHECKPOINTS,
    Damage,
    Report,
    candidates,
    checkpoint_name,
    list_checkpoints,
    newest_sound,
    obsolete,
    remove_checkpoints,
    remove_leftovers,
)
from dsllm.checkpoint.manifest import CheckpointManifest, ModelRecord, ParameterRecord, PartRecord, What
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.verify import damage_in
from dsllm.checkpoint.write import (
    discard_checkpoint,
    merge_parameters,
    publish_checkpoint,
    start_checkpoint,
    write_slices,
)
from dsllm.config.compare import differences
from dsllm.config.load import run_to_dict
from dsllm.config.migrate import CONFIG_VERSION, changed_fields
from dsllm.config.run import RunConfig
from dsllm.config.train import CheckpointConfig
from dsllm.engine.build import Engine
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_loss_scaler_state, load_state, loss_scaler_state, owned_slices
from dsllm.errors import CheckpointError
from dsllm.train.progress import Progress


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a save needs to know about the run, apart from tensors and progress."""

    config: RunConfig
    """The resolved run."""
    deepspeed: Mapping[str, Any]
    """The final DeepSpeed config."""
    versions: Mapping[str, str]
    """Libraries in use."""
    damaged: Sequence[Path] = ()
    """Damaged checkpoints that were skipped at the start; removed once a new one is published."""


def save_checkpoint(
    engine: Engine, progress: Progress, record: RunRecord, directory: Path, keep: CheckpointConfig, report: Report
) -> Path:
    """Save the run's state as RUN/checkpoints/step-N, then remove the checkpoints that are no longer kept. A collective call.

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

    def publish() -> list[str]:
        try:
            if problems:
                raise CheckpointError("; ".join(problems))
            publish_checkpoint(Path(aside), final, _manifest(engine, progress, record, [w for w, _ in answers]))
        except CheckpointError:
            discard_checkpoint(Path(aside))
            raise
        listed = list_checkpoints(checkpoints)
        # the run is saved: what goes wrong from here on is reported and ends nothing
        return remove_checkpoints(obsolete(listed, final, record.damaged, keep.keep_last, keep.keep_every_steps))

    for warning in _on_rank_0(world, publish):
        report(warning)
    return final


def _manifest(
    engine: Engine,
    progress: Progress,
    record: RunRecord,
    written: Sequence[tuple[PartRecord, dict[str, ParameterRecord]]],
) -> CheckpointManifest:
    config = run_to_dict(record.config)
    return CheckpointManifest(
        progress=progress.to_dict(),
        engine={
            "stage": engine.stage,
            "precision": engine.precision,
            "world_size": engine.world.size,
            "loss_scaler": loss_scaler_state(engine),
        },
        model=ModelRecord(
            config=config["model"], context_length=record.config.context_length, precision=engine.precision
        ),
        config=config,
        config_version=CONFIG_VERSION,
        config_changed=changed_fields(record.config),
        deepspeed=dict(record.deepspeed),
        versions=dict(record.versions),
        parameters=merge_parameters([parameters for _, parameters in written]),
        parts=tuple(part for part, _ in written),
    )


def _on_rank_0(world: World, action: Callable[[], Any], doing: str = "the run's state could not be saved") -> Any:
    """Do something on rank 0; its value on every rank, and its failure on every rank too."""
    value, problem = None, None
    if world.rank == 0:
        try:
            value = action()
        except (CheckpointError, OSError) as error:
            problem = str(error)
    value, problem = world.gather((value, problem))[0]
    if problem:
        raise CheckpointError(f"{doing}: {problem}")
    return value


def find_resumable(directory: Path, world: World, report: Report) -> tuple[CheckpointReader | None, list[Path]]:
    """The newest sound checkpoint of a run (None: the run has none) and the damaged newer ones; a collective call.

    Rank 0 lists the folder and the others take its list: on a network file system two hosts may see different ones. The
    ranks share the reading, and so agree on the answer.
    """
    unreadable = "the run's checkpoints could not be listed"
    listed = _on_rank_0(world, lambda: list_checkpoints(directory / CHECKPOINTS), unreadable)
    found, damaged = newest_sound(listed, report, _shared_damage(world, "all"))
    return (None if found is None else CheckpointReader(found)), damaged


def find_weights(path: Path, world: World, report: Report) -> CheckpointReader:
    """The checkpoint that a path means, its weights verified by all ranks together; a collective call.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    listed = _on_rank_0(world, lambda: candidates(path), "its weights could not be found")
    found, _ = newest_sound(listed, report, _shared_damage(world, "weights"))
    assert found is not None, "candidates returns at least one checkpoint"
    return CheckpointReader(found)


def _shared_damage(world: World, what: What) -> Damage:
    """Verifies a checkpoint with all ranks: each reads its share of the files, and all get the same answer."""

    def damage(folder: Path) -> str | None:
        answers = world.gather(damage_in(folder, world.rank, world.size, what))
        return next((a for a in answers if a), None)

    return damage


def check_same_run(saved: RunConfig, asked: RunConfig, where: Path, report: Report) -> None:
    """Resume or refuse: differences that are allowed are reported, any other ends the attempt.

    Raises:
        CheckpointError: lists what differs, and how to start a new run from the checkpoint.
    """
    found = differences(saved, asked)
    refused = [d for d in found if not d.changeable]
    if refused:
        raise CheckpointError(
            f"{where} belongs to a run that differs in:\n"
            + "\n".join(f"- {d}" for d in refused)
            + f"\nTo continue that run, undo these changes. To start a new run from its weights, set another run.directory and "
            f"model.init_from={where}"
        )
    for difference in found:
        report(f"changed since the last attempt: {difference}")


def restore(engine: Engine, reader: CheckpointReader) -> Progress:
    """Load weights, optimizer state, loss scale and counters; a collective call."""
    progress = Progress.from_dict(reader.manifest.progress, str(reader.folder))
    load_state(engine, reader)
    load_loss_scaler_state(engine, reader.manifest.engine["loss_scaler"])
    return progress


def clean_up(directory: Path, world: World) -> None:
    """Remove what a killed attempt left among the checkpoints. Call it once the run's lock is held and resuming is agreed."""
    if world.rank == 0:
        remove_leftovers(directory / CHECKPOINTS)
