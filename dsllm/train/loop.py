"""The training loop: everything that happens in a run, in the order in which it happens."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsllm.config.run import RunConfig
from dsllm.data import fingerprint
from dsllm.engine.build import Engine
from dsllm.engine.instruments.diagnosis import find_not_finite
from dsllm.engine.instruments.layer_statistics import LayerStatistics
from dsllm.engine.processes.device import peak_memory_gib
from dsllm.engine.step import MicroBatch, StepResult, set_learning_rate, take_step
from dsllm.errors import RunError
from dsllm.train.breakdown import Breakdown
from dsllm.train.interrupt import stop_signals
from dsllm.train.metrics import Metrics, step_line
from dsllm.train.profile import Profile
from dsllm.train.progress import Progress
from dsllm.train.run_directory import write_status
from dsllm.train.saving import RunRecord, save_checkpoint
from dsllm.train.schedule import learning_rate_at

HOPELESS_STEPS = 50
"""Skipped steps in a row after which a run is given up. Dynamic loss scaling needs at most about 20 to settle."""


class HashedMicroBatch(MicroBatch, Protocol):
    """A micro-batch that knows what it delivers."""

    @property
    def fingerprint(self) -> int:
        """64-bit hash of its samples, as delivered; adds up over micro-batches and ranks."""
        ...

    @property
    def origin(self) -> str:
        """Which samples these are, in words."""
        ...


class StepBatches(Protocol):
    """Where the loop's micro-batches come from: a pure function of the step."""

    def step(self, step: int) -> Sequence[HashedMicroBatch]:
        """This rank's micro-batches of an optimizer step."""
        ...


Validate = Callable[[Engine], Mapping[str, float]]
"""Measures the held-out loss; a collective call. Its numbers are added to the step's row."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop needs of the run besides engine and batches."""

    config: RunConfig
    directory: Path
    record: RunRecord
    metrics: Metrics | None
    """On rank 0 only."""
    tell: Callable[[str], None]
    """Says something on the terminal; silent on the other ranks."""
    breakdown: Breakdown
    profile: Profile


def train(
    engine: Engine, batches: StepBatches, progress: Progress, run: Run, validate: Validate
) -> tuple[Progress, str]:
    """Run optimizer steps until the token budget is spent or a signal comes. Returns the progress, and the signal if any.

    Raises:
        RunError: the gradients stay non-finite.
        CheckpointError: the state cannot be saved.
    """
    config, saved_at = run.config, time.monotonic()
    with stop_signals() as stop:
        while progress.step < config.num_steps:
            run.profile.before(progress.step + 1)
            run.breakdown.watch.start_step()
            began = time.perf_counter()
            learning_rate = learning_rate_at(progress.step, config)
            set_learning_rate(engine, learning_rate)
            with run.breakdown.watch.part("data"):
                micro_batches = batches.step(progress.step)
                own = fingerprint.add(*(batch.fingerprint for batch in micro_batches))
            layers = _look_into_layers(engine, progress.step + 1, config)
            late = engine.world.rank == 0 and _minutes_passed(saved_at, config.checkpoint.every_minutes)
            result = take_step(
                engine,
                micro_batches,
                seed=config.run.seed + progress.step,
                also_sum=(*fingerprint.halves(own), stop.requested, late),
                watch=run.breakdown.watch,
                layers=layers,
            )
            low, high, stops, lates = result.sums
            step_fingerprint = fingerprint.from_halves(low, high)
            progress = progress.after(
                result, step_fingerprint, fingerprint.chain(progress.fingerprint, step_fingerprint)
            )
            seconds = time.perf_counter() - began
            last = progress.step == config.num_steps
            parts, measured = run.breakdown.columns(seconds), dict[str, float]()
            run.profile.after(progress.step)
            layer_rows = layers.rows() if layers else []
            if last or _due(progress.step, config.train.validate_every_steps):
                measured = dict(validate(engine))
            if run.metrics is not None:
                memory_gib = peak_memory_gib(engine.world.device)
                row = run.metrics.row(result, progress, learning_rate, seconds, memory_gib) | parts | measured
                run.metrics.record(row)
                run.metrics.record_layers(progress.step, layer_rows)
                _tell_step(row, measured, run)
            if _hopeless(engine, progress, result, config):
                raise RunError(_diagnosis(engine, micro_batches, progress, result, config))
            if last or stops or lates or _due(progress.step, config.checkpoint.every_steps):
                _save(engine, progress, run)
                saved_at = time.monotonic()
            if stops and not last:
                return progress, stop.reason or "another rank was asked to stop"
    return progress, ""


def _tell_step(row: Mapping[str, Any], measured: Mapping[str, float], run: Run) -> None:
    """A line on the terminal: now and then, at both ends, and whenever the held-out loss was measured."""
    if measured or row["step"] in (1, run.config.num_steps) or _due(row["step"], run.config.log.every_steps):
        run.tell("  ".join([step_line(row, run.config), *(f"{key} {value:.4f}" for key, value in measured.items())]))


def _look_into_layers(engine: Engine, step: int, config: RunConfig) -> LayerStatistics | None:
    return LayerStatistics(engine) if _due(step, config.log.layer_statistics_every_steps) else None


def _save(engine: Engine, progress: Progress, run: Run) -> None:
    folder = save_checkpoint(engine, progress, run.record, run.directory, run.config.checkpoint, run.tell)
    run.tell(f"saved {folder}")
    if run.metrics is not None:
        facts = {"attempt": run.metrics.attempt, "step": progress.step, "tokens": progress.tokens}
        write_status(run.directory, "running", **facts, checkpoint=folder.name)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _minutes_passed(since: float, minutes: float) -> bool:
    return minutes > 0 and time.monotonic() - since >= 60 * minutes


def _hopeless(engine: Engine, progress: Progress, result: StepResult, config: RunConfig) -> bool:
    """Whether the run can no longer recover from gradients that are not finite. The same on all ranks."""
    scale = config.train.loss_scale
    collapsed = engine.precision == "fp16" and scale.static == 0 and result.loss_scale <= scale.minimum
    endured = scale.hysteresis if collapsed else HOPELESS_STEPS
    return progress.skipped_in_a_row >= endured


def _diagnosis(
    engine: Engine,
    micro_batches: Sequence[HashedMicroBatch],
    progress: Progress,
    result: StepResult,
    config: RunConfig,
) -> str:
    """Why the run is given up: the module and the batch where numbers first go wrong; a collective call."""
    found = find_not_finite(engine, micro_batches, seed=config.run.seed + progress.step - 1)
    origins = engine.world.gather([batch.origin for batch in micro_batches])
    if found is None:
        where = "each micro-batch is finite by itself: their sum over micro-batches and ranks is not"
    else:
        where = f"not finite first: {found} ({origins[found.rank][found.micro_batch]})"
    scale = f", the last at a loss scale of {result.loss_scale:g}" if engine.precision == "fp16" else ""
    return (
        f"the gradients of {progress.skipped_in_a_row} steps in a row were not finite{scale}: the run does not recover by "
        f"itself. In step {progress.step} {where}. Lower train.optimizer.learning_rate, lengthen the warm-up, or use a "
        "wider train.precision"
    )
