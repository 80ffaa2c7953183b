"""Finds the checkpoint that a run continues from, and checks that it belongs to the same run and data."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dsllm.checkpoint.find import Damage, candidates, list_checkpoints, newest_sound, remove_leftovers
from dsllm.checkpoint.manifest import What
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.read_manifest import UnavailableCheckpointError
from dsllm.checkpoint.verify import damage_in
from dsllm.config.compare import belongs_to_another_run, differences, refusal
from dsllm.config.run import RunConfig
from dsllm.config.yaml_file import read_yaml
from dsllm.data import fingerprint
from dsllm.data.training import TrainingBatches
from dsllm.engine.processes.process_group import World
from dsllm.errors import CheckpointError, DataError, RunError
from dsllm.run_directory import CHECKPOINTS, RUN_FILE
from dsllm.session.agreement import on_rank_0
from dsllm.session.progress import Progress, read_progress
from dsllm.untrusted_files import UntrustedFileError, check_regular

Report = Callable[[str], None]
MOST_RUN_BYTES = 2**18
"""A run file of thousands of sources is smaller."""


def find_resumable(directory: Path, world: World, report: Report) -> tuple[CheckpointReader | None, list[Path]]:
    """The newest sound checkpoint of a run (None: the run has none) and the damaged newer ones; a collective call.

    Rank 0 lists the folder, since two hosts may see different lists on a network file system. Each rank verifies a share
    of the files, and all get the same answer.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged; or one may be sound, but cannot be read here.
    """
    unreadable = "the run's checkpoints could not be listed"
    listed = on_rank_0(world, lambda: list_checkpoints(directory / CHECKPOINTS), unreadable)
    found, damaged = newest_sound(listed, report, _shared_damage(world, "all"))
    return (None if found is None else CheckpointReader(found)), damaged


def find_weights(path: Path, world: World, report: Report) -> CheckpointReader:
    """The checkpoint that a path names, with its weights verified by all ranks together; a collective call.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    listed = on_rank_0(world, lambda: candidates(path), "its weights could not be found")
    found, _ = newest_sound(listed, report, _shared_damage(world, "weights"))
    assert found is not None, "candidates returns at least one checkpoint"
    return CheckpointReader(found)


def _shared_damage(world: World, what: What) -> Damage:
    """A check of one checkpoint by all ranks: each reads its share of the files, and all get the same answer."""

    def damage(folder: Path) -> str | None:
        own: str | UnavailableCheckpointError | None
        try:
            own = damage_in(folder, world.rank, world.size, what)
        except UnavailableCheckpointError as error:
            own = error
        answers = world.gather(own)
        for answer in answers:
            if isinstance(answer, UnavailableCheckpointError):
                raise answer
        return next((answer for answer in answers if answer), None)

    return damage


def clean_up(directory: Path, world: World) -> None:
    """Make the folder of the checkpoints, and remove what a killed attempt left in it; a collective call.

    Only while the directory is held.

    Raises:
        CheckpointError: on all ranks: there can be no such folder, so no save would succeed.
    """
    folder = directory / CHECKPOINTS

    def clean() -> None:
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)

    on_rank_0(world, clean, "the run's checkpoints could not be saved")


def check_same_run(saved: RunConfig, config: RunConfig, where: Path, report: Report) -> None:
    """Report the differences that are allowed on resume, and refuse all others.

    Raises:
        CheckpointError: lists what differs, and how to start a new run from the checkpoint.
    """
    found = differences(saved, config)
    refused = [difference for difference in found if not difference.changeable]
    if refused:
        raise CheckpointError(refusal(refused, where))
    for difference in found:
        report(f"changed since the last attempt: {difference}")


def check_unsaved_run(directory: Path, config: RunConfig, report: Report) -> None:
    """Refuse a directory without checkpoints that belongs to another run.

    Raises:
        RunError: it does.
    """
    saved = directory / RUN_FILE
    if not saved.is_file():
        return
    try:
        if check_regular(saved) > MOST_RUN_BYTES:
            raise UntrustedFileError(f"is larger than {MOST_RUN_BYTES:,} bytes")
        tree = read_yaml(saved)[0]
    except (OSError, UntrustedFileError) as error:
        raise RunError(
            f"{saved}: cannot be read, so nobody knows which run this is: {error}; set another run.directory"
        ) from error
    section = tree.get("run") if isinstance(tree, dict) else None
    name = section.get("name") if isinstance(section, dict) else None
    if name != config.run.name:
        raise RunError(belongs_to_another_run(directory, name, config.run.name))
    report(f"{directory} has no checkpoint yet: starting over")


def saved_run(reader: CheckpointReader) -> RunConfig:
    """The run that saved a checkpoint, with the precision that was really used."""
    run = reader.run()
    precision = reader.manifest.engine.get("precision", run.train.precision)
    return dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision))


def progress_of(reader: CheckpointReader, config: RunConfig) -> Progress:
    """How far the run was when it was saved."""
    return read_progress(reader.manifest.progress, config.train.global_batch_sequences, str(reader.folder))


def check_counts(progress: Progress, config: RunConfig, where: Path) -> None:
    """Refuse counters that contradict each other: a manifest of format 1 or 2 has no checksum that would find damage.

    Raises:
        CheckpointError: they do.
    """
    position = progress.position
    skipped = sum(stop - first for first, stop in position.skipped if stop <= position.next_sample)
    samples, tokens = progress.step * config.train.global_batch_sequences, progress.step * config.tokens_per_step
    if position.next_sample - skipped != samples or progress.tokens != tokens:
        raise CheckpointError(
            f"{where}: is damaged: {progress.step} steps read {samples} samples and {tokens} tokens, but it has counted "
            f"{position.next_sample - skipped} and {progress.tokens}: move it away to continue from an older checkpoint"
        )


def check_data(progress: Progress, data_sha256: str, config: RunConfig, where: Path) -> None:
    """Refuse prepared data that is not what the run was trained on.

    Raises:
        DataError: it is not.
    """
    if progress.data_sha256 != data_sha256:
        raise DataError(
            f"data.directory {config.data.directory}: is not the data that {where} was trained on (the manifests differ): "
            "restore that data, or start a new run with model.init_from"
        )


def check_delivery(progress: Progress, batches: TrainingBatches, world: World) -> None:
    """Deliver the last step's samples again, and check that they are the ones trained on. A collective call.

    Raises:
        DataError: they are not.
    """
    if progress.step == 0:
        return
    own = batches.fingerprint(progress.position.before(batches.global_batch_sequences))
    if not world.is_first_reader:
        own = 0  # another rank reads the same samples
    if fingerprint.from_halves(*world.sum(fingerprint.halves(own))) != progress.last_step_fingerprint:
        raise DataError(
            f"the loaders deliver other samples for step {progress.step} than those trained on: a shard's content or the "
            "sources' weights have changed; `dsllm prepare CONFIG` says which"
        )
