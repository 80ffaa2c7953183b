"""Saves a run's state in three parts: start a save, poll it in later steps, finish it before the run ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsllm.checkpoint.find import retire
from dsllm.checkpoint.manifest import CheckpointManifest
from dsllm.checkpoint.write import (
    checkpoint_name,
    discard_checkpoint,
    merge_parameters,
    publish_checkpoint,
    start_checkpoint,
    write_slices,
)
from dsllm.config.train import CheckpointConfig
from dsllm.engine.build import Engine
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import loss_scaler_state, owned_slices
from dsllm.errors import CheckpointError
from dsllm.run_directory import CHECKPOINTS
from dsllm.session.progress import Progress
from dsllm.session.record import RunRecord

Report = Callable[[str], None]


class Saver:
    """Writes checkpoints into RUN/checkpoints, one at a time. All methods are collective calls.

    Today `start` writes and publishes before it returns; `poll` and `finish` are where a save that runs behind training
    will report.
    """

    def __init__(self, directory: Path, record: RunRecord, keep: CheckpointConfig, report: Report):
        """
        Args:
            directory: the run's
            keep: which checkpoints stay
        """
        self._checkpoints = directory / CHECKPOINTS
        self._record, self._keep, self._report = record, keep, report
        self._published: Path | None = None

    def start(self, engine: Engine, progress: Progress) -> None:
        """Save the run's state as step-N. Old checkpoints are removed once the new one is published.

        Raises:
            CheckpointError: on all ranks, if any of them could not write; nothing half-written is left, older ones stay.
        """
        assert self._published is None, "the last save was not polled"
        self._published = self._save(engine, progress)

    def poll(self) -> Path | None:
        """The checkpoint that was published since the last call, if any."""
        published, self._published = self._published, None
        return published

    def finish(self) -> Path | None:
        """Wait until nothing is being saved any more; then as `poll`."""
        return self.poll()

    def _save(self, engine: Engine, progress: Progress) -> Path:
        world = engine.world
        final = self._checkpoints / checkpoint_name(progress.step)
        aside = Path(_on_rank_0(world, lambda: start_checkpoint(self._checkpoints, progress.step)))
        written, problem = None, None
        try:
            written = write_slices(aside, world.rank, owned_slices(engine))
        except CheckpointError as error:
            problem = str(error)
        answers = world.gather((written, problem))
        problems = [p for _, p in answers if p]

        def publish() -> None:
            if problems:
                discard_checkpoint(aside)
                raise CheckpointError("; ".join(problems))
            try:
                publish_checkpoint(aside, final, self._manifest(engine, progress, [w for w, _ in answers]))
            except CheckpointError:
                discard_checkpoint(aside)
                raise

        _on_rank_0(world, publish)
        if world.rank == 0:
            self._remove_old(progress.step)
        return final

    def _manifest(self, engine: Engine, progress: Progress, written: list[Any]) -> CheckpointManifest:
        return CheckpointManifest(
            progress=progress.to_dict(),
            engine={
                "stage": engine.stage,
                "precision": engine.precision,
                "world_size": engine.world.size,
                "loss_scaler": loss_scaler_state(engine),
            },
            config=self._record.config_as_dict,
            deepspeed=dict(self._record.deepspeed),
            versions=self._record.versions,
            parameters=merge_parameters([w[1] for w in written]),
            files=[w[0] for w in written],
        )

    def _remove_old(self, step: int) -> None:
        """Housekeeping after a good save: it may warn, but never fails the run."""
        try:
            retire(self._checkpoints, self._keep.keep_last, self._keep.keep_every_steps)
        except OSError as error:
            self._report(f"old checkpoints in {self._checkpoints} could not be removed: {error.strerror or error}")


def _on_rank_0(world: World, action: Callable[[], Any]) -> Any:
    """Do something on rank 0; its value on every rank, and its failure on every rank too."""
    value, problem = None, None
    if world.rank == 0:
        try:
            value = action()
        except (CheckpointError, OSError) as error:
            problem = str(error)
    value, problem = world.send_from_rank_0((value, problem))
    if problem:
        raise CheckpointError(f"the run's state could not be saved: {problem}")
    return value
