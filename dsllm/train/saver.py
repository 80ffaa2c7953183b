"""Saves a run's state in three parts: start a save, poll it in later steps, finish it before the run ends."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from dsllm.checkpoint.find import checkpoint_name, list_checkpoints, looks_sound, obsolete, remove_checkpoints
from dsllm.checkpoint.manifest import CheckpointManifest, ModelRecord, ParameterRecord, PartRecord
from dsllm.checkpoint.write import (
    discard_checkpoint,
    merge_parameters,
    publish_checkpoint,
    start_checkpoint,
    write_slices,
)
from dsllm.config.migrate import CONFIG_VERSION, changed_fields
from dsllm.engine.build import Engine
from dsllm.engine.state import loss_scaler_state, owned_slices
from dsllm.errors import CheckpointError
from dsllm.run_directory import CHECKPOINTS
from dsllm.session.agreement import on_rank_0
from dsllm.session.progress import Progress
from dsllm.session.record import RunRecord

Report = Callable[[str], None]


class Saver:
    """Writes checkpoints into RUN/checkpoints, one at a time. All methods are collective calls.

    Today `start` writes and publishes before it returns; `poll` and `finish` are where a save that runs behind training
    will report.
    """

    def __init__(self, directory: Path, record: RunRecord, report: Report, damaged: Collection[Path] = ()):
        """
        Args:
            directory: the run's
            damaged: checkpoints that were skipped at the start; removed once a new one is published
        """
        self._checkpoints = directory / CHECKPOINTS
        self._record, self._report, self._damaged = record, report, damaged
        self._keep = record.config.checkpoint
        self._published: Path | None = None
        self._warned: set[str] = set()

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
        aside = on_rank_0(
            world, lambda: start_checkpoint(self._checkpoints, progress.step), "the run's state could not be saved"
        )
        written, problem = None, None
        try:
            written = write_slices(aside, world.rank, owned_slices(engine))
        except CheckpointError as error:
            problem = str(error)
        answers = world.gather((written, problem))
        problems = [p for _, p in answers if p]

        def publish() -> list[str]:
            try:
                if problems:
                    raise CheckpointError("; ".join(problems))
                manifest = self._manifest(engine, progress, [w for w, _ in answers])
                warnings = publish_checkpoint(aside, final, manifest)
            except CheckpointError:
                discard_checkpoint(aside)
                raise
            return warnings + self._remove_obsolete(final)

        for warning in on_rank_0(world, publish, "the run's state could not be saved"):
            if warning not in self._warned:  # what cannot be removed is in the way at every save
                self._report(warning)
                self._warned.add(warning)
        return final

    def _remove_obsolete(self, newest: Path) -> list[str]:
        """Remove the checkpoints that are no longer kept; returns what went wrong. The run is saved, so nothing is raised."""
        try:
            listed = list_checkpoints(self._checkpoints)
        except OSError as error:
            return [
                f"{self._checkpoints}: cannot be listed, so no older checkpoint is removed: {error.strerror or error}"
            ]
        keep = self._keep
        every, last = keep.keep_every_steps, keep.keep_last
        return remove_checkpoints(obsolete(listed, newest, self._damaged, last, every, looks_sound))

    def _manifest(
        self,
        engine: Engine,
        progress: Progress,
        written: Sequence[tuple[PartRecord, dict[str, ParameterRecord]]],
    ) -> CheckpointManifest:
        run, config = self._record.config, self._record.config_as_dict
        return CheckpointManifest(
            progress=progress.to_dict(),
            engine={
                "stage": engine.stage,
                "precision": engine.precision,
                "world_size": engine.world.size,
                "mesh": asdict(engine.world.mesh),
                "loss_scaler": loss_scaler_state(engine),
            },
            model=ModelRecord(config=config["model"], context_length=run.context_length, precision=engine.precision),
            config=config,
            config_version=CONFIG_VERSION,
            config_changed=changed_fields(run),
            deepspeed=dict(self._record.deepspeed),
            versions=self._record.versions,
            tokenizer_sha256=self._record.tokenizer_sha256,
            parameters=merge_parameters([parameters for _, parameters in written]),
            parts=tuple(part for part, _ in written),
        )
