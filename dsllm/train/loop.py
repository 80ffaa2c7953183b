"""The training loop: everything that happens in a run, in the order in which it happens."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsllm.config.run import RunConfig
from dsllm.data import fingerprint
from dsllm.engine.build import Engine
from dsllm.engine.device import peak_memory_gib
from dsllm.engine.step import MicroBatch, set_learning_rate, take_step
from dsllm.errors import RunError
from dsllm.train.interrupt import stop_signals
from dsllm.train.metrics import Metrics, step_line
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
            began = time.perf_counter()
            learning_rate = learning_rate_at(progress.step, config)
            set_learning_rate(engine, learning_rate)
            micro_batches = batches.step(progress.step)
            own = fingerprint.add(*(batch.fingerprint for batch in micro_batches))
            late = engine.world.rank == 0 and _minutes_passed(saved_at, config.checkpoint.every_minutes)
            result = take_step(
                engine,
                micro_batches,
                seed=config.run.seed + progress.step,
                also_sum=(*fingerprint.halves(own), stop.requested, late),
            )
            low, high, stops, lates = result.sums
            step_fingerprint = fingerprint.from_halves(low, high)
            progress = progress.after(
                result, step_fingerprint, fingerprint.chain(progress.fingerprint, step_fingerprint)
            )
            seconds = time.perf_counter() - began
            last = progress.step == config.num_steps
            measured: dict[str, float] = {}
            if last or _due(progress.step, config.train.validate_every_steps):
                measured = dict(validate(engine))
            if run.metrics is not None:
                memory_gib = peak_memory_gib(engine.world.device)
                row = run.metrics.row(result, progress, learning_rate, seconds, memory_gib) | measured
                run.metrics.record(row)
                _tell_step(row, measured, run)
            _check_health(progress)
            if last or stops or lates or _due(progress.step, config.checkpoint.every_steps):
                _save(engine, progress, run)
                saved_at = time.monotonic()
            if stops and not last:
                return progress, stop.signal_name or "a signal on another rank"
    return progress, ""


def _tell_step(row: Mapping[str, Any], measured: Mapping[str, float], run: Run) -> None:
    """A line on the terminal: now and then, at both ends, and whenever the held-out loss was measured."""
    if measured or row["step"] in (1, run.config.num_steps) or _due(row["step"], run.config.log.every_steps):
        run.tell("  ".join([step_line(row, run.config), *(f"{key} {value:.4f}" for key, value in measured.items())]))


def _save(engine: Engine, progress: Progress, run: Run) -> None:
    folder = save_checkpoint(engine, progress, run.record, run.directory, run.config.checkpoint)
    run.tell(f"saved {folder}")
    if run.metrics is not None:
        facts = {"attempt": run.metrics.attempt, "step": progress.step, "tokens": progress.tokens}
        write_status(run.directory, "running", **facts, checkpoint=folder.name)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _minutes_passed(since: float, minutes: float) -> bool:
    return minutes > 0 and time.monotonic() - since >= 60 * minutes


def _check_health(progress: Progress) -> None:
    if progress.skipped_in_a_row >= HOPELESS_STEPS:
        raise RunError(
            f"the gradients of {HOPELESS_STEPS} steps in a row were not finite (last: step {progress.step}): the run does not "
            "recover by itself. Lower train.optimizer.learning_rate, lengthen the warm-up, or use a wider train.precision"
        )
