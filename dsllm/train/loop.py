"""The training loop: everything that happens in a run, in the order in which it happens."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dsllm.batches import MicroBatch
from dsllm.config.run import RunConfig
from dsllm.data import fingerprint
from dsllm.data.prefetch import Prefetch
from dsllm.engine.build import Engine
from dsllm.engine.instruments.diagnosis import find_not_finite
from dsllm.engine.instruments.layer_statistics import LayerStatistics
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.step import Instruments, StepResult, take_step
from dsllm.errors import RunError
from dsllm.objectives import Objective, TokenLoss
from dsllm.session.agreement import stop_together
from dsllm.session.open import Session
from dsllm.session.progress import Progress
from dsllm.train.conclusion import conclude
from dsllm.train.interrupt import Stop
from dsllm.train.records import Records, open_records
from dsllm.train.saver import Saver
from dsllm.train.schedule import learning_rate_at

HOPELESS_STEPS = 50
"""Skipped steps in a row after which a run is given up. Dynamic loss scaling needs at most about 20 to settle."""

Validate = Callable[[Engine], Mapping[str, float]]
"""Measures the held-out loss; a collective call. Its numbers are added to the step's row."""


def train(session: Session, validate: Validate, stop: Stop, profile_steps: str | None = None) -> int:
    """Train an open session until it is finished or interrupted; returns the process's exit code.

    Args:
        stop: whether this process was asked to stop
        profile_steps: FIRST:LAST, the steps to profile; empty: some after a warm-up; None (default): none

    Raises:
        RunError: the gradients stay non-finite.
        CheckpointError: the state cannot be saved.
        DataError: a shard cannot be read.
        Interrupted: a rank was asked to stop before the first step.
    """
    with open_records(session, profile_steps) as records:
        stop.begin_steps(partial(session.directory.write_status, "failed", reason="ended at once by a second SIGINT"))
        stop_together(session.world, stop.why)
        progress, stopped_by = run_steps(session, validate, records, TokenLoss(), stop)
    return conclude(session, progress, stopped_by)


def run_steps(
    session: Session, validate: Validate, records: Records, objective: Objective, stop: Stop
) -> tuple[Progress, str]:
    """Run optimizer steps until the token budget is spent or a signal comes; the progress, and the signal if any."""
    config, engine, progress = session.config, session.engine, session.progress
    batch_sequences, saved_at = config.train.global_batch_sequences, time.monotonic()
    saver = Saver(session.directory.path, session.record, session.report, session.damaged)
    pin = engine.world.device.type == "cuda"
    with (
        Prefetch(session.batches, enabled=config.data.prefetch, pin=pin) as ahead,
        session.verification.running() as verification,
    ):
        while progress.step < config.num_steps:
            began = records.start_step(progress.step + 1)
            learning_rate = learning_rate_at(progress.step, config)
            set_learning_rate(engine.optimizer, learning_rate)
            last = progress.step + 1 == config.num_steps
            next_position = progress.position.after(batch_sequences)
            with records.timer.part("data"):
                batches = ahead.step(progress.position, None if last else next_position)
                own = fingerprint.add(*(batch.fingerprint for batch in batches))
            layers = (
                LayerStatistics(engine) if _due(progress.step + 1, config.log.layer_statistics_every_steps) else None
            )
            late = engine.world.rank == 0 and _minutes_passed(saved_at, config.checkpoint.every_minutes)
            # the step's one all-reduce also agrees on stopping and saving: a rank that decided alone would hang the others
            result = take_step(
                engine,
                batches,
                objective,
                seed=step_seed(config.run.seed, progress.step),
                # one number for the last two, because more numbers might be added up in another order
                also_sum=(*fingerprint.halves(own), stop.requested(), late + 2 * verification.found_damage),
                instruments=Instruments(timer=records.timer, layers=layers),
            )
            low, high, stops, signs = result.sums
            damaged, lates = divmod(int(signs), 2)
            progress = progress.after(result, next_position, fingerprint.from_halves(low, high))
            if damaged:
                verification.refuse(progress)
            seconds = records.end_step(progress.step, began)
            measured: Mapping[str, float] = {}
            if last or _due(progress.step, config.train.validate_every_steps):
                verification.check_held_out(progress)
                measured = validate(engine)
            records.write(result, progress, learning_rate, seconds, measured)
            if layers:
                records.write_layers(progress.step, layers.rows())
            if _hopeless(engine, progress, result, config):
                raise RunError(_diagnosis(engine, batches, objective, progress, result, config))
            if last or stops or lates or _due(progress.step, config.checkpoint.every_steps):
                records.renew_directory()
                verification.before_save(progress, last)
                saver.start(engine, progress)
                saved_at = time.monotonic()
            records.write_saved(saver.finish() if last or stops else saver.poll(), progress)
            if stops and not last:
                return progress, stop.reason or "another rank received a signal"
    return progress, ""


def step_seed(run_seed: int, step: int) -> int:
    """The seed of one step's dropout, step counted from 0: no two runs share a step's masks, as they would with a sum."""
    return int.from_bytes(hashlib.sha256(f"dropout {run_seed} {step}".encode()).digest()[:7], "little")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _minutes_passed(since: float, minutes: float) -> bool:
    return minutes > 0 and time.monotonic() - since >= 60 * minutes


def _hopeless(engine: Engine, progress: Progress, result: StepResult, config: RunConfig) -> bool:
    """Whether the run is given up, because gradients stay not finite. The same on all ranks."""
    scale = config.train.loss_scale
    collapsed = engine.precision == "fp16" and scale.static == 0 and result.loss_scale <= scale.minimum
    endured = scale.hysteresis if collapsed else HOPELESS_STEPS
    return progress.skipped_in_a_row >= endured


def _diagnosis(
    engine: Engine,
    batches: Sequence[MicroBatch],
    objective: Objective,
    progress: Progress,
    result: StepResult,
    config: RunConfig,
) -> str:
    """Why the run is given up: the module and the batch where numbers first go wrong; a collective call."""
    found = find_not_finite(engine, batches, objective, seed=step_seed(config.run.seed, progress.step - 1))
    origins: list[list[Any]] = engine.world.gather([str(batch.origin) for batch in batches])
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
