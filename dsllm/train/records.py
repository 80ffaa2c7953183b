"""Records a run while it trains: rows of metrics, times of its steps, a profile, lines on the terminal."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.yaml_file import write_yaml
from dsllm.data.tokenizer_folder import copy_tokenizer
from dsllm.engine.instruments.step_timer import StepTimer, timing
from dsllm.engine.processes.device import num_threads, peak_flops, peak_memory_gib
from dsllm.engine.step import StepResult
from dsllm.errors import RunError
from dsllm.files import write_atomically
from dsllm.run_directory import DATA_CARD_FILE, DEEPSPEED_FILE, PROFILE, RUN_FILE, TOKENIZER
from dsllm.session.agreement import on_rank_0
from dsllm.session.open import Session
from dsllm.session.progress import Progress
from dsllm.train.breakdown import Breakdown, table
from dsllm.train.metrics import Metrics, Speed, short, step_line
from dsllm.train.profile import Expected, Profile, steps_to_profile
from dsllm.train.schedule import seam
from dsllm.untrusted_files import UntrustedFileError, parse_json, read_bounded


@dataclass
class Records:
    """Records the steps of one attempt. Only rank 0 writes."""

    session: Session
    timer: StepTimer
    """Times the parts of each step."""
    breakdown: Breakdown
    profile: Profile
    metrics: Metrics | None
    """On rank 0 only."""
    _parts: Mapping[str, float] = field(init=False, default_factory=dict)

    def start_step(self, step: int) -> float:
        """Call before a step, numbered from 1; returns the time at which it begins."""
        self.profile.before(step)
        self.timer.start_step()
        return time.perf_counter()

    def end_step(self, step: int, began: float) -> float:
        """Call after a step; returns the seconds that it took."""
        seconds = time.perf_counter() - began
        self._parts = self.breakdown.columns(seconds)
        self.profile.after(step)
        return seconds

    def write(
        self,
        result: StepResult,
        progress: Progress,
        learning_rate: float,
        seconds: float,
        measured: Mapping[str, float],
    ) -> None:
        """Write a step's row, and now and then a line on the terminal.

        Args:
            measured: the held-out loss and the like, where it was measured after this step
        """
        if self.metrics is None:
            return
        config = self.session.config
        memory_gib = peak_memory_gib(self.session.world.device)
        row = self.metrics.row(result, progress, learning_rate, seconds, memory_gib) | {**self._parts, **measured}
        self.metrics.record(row)
        # at both ends too, and whenever the held-out loss was measured
        if measured or progress.step in (1, config.num_steps) or progress.step % config.log.every_steps == 0:
            numbers = (f"{key} {value:.4f}" for key, value in measured.items())
            self.session.report("  ".join([step_line(row, config), *numbers]))

    def write_layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the statistics of a step's layers."""
        if self.metrics is not None:
            self.metrics.record_layers(step, rows)

    def renew_directory(self) -> None:
        """Before a save: make sure that the directory is still this run's, and describe the run anew if it was removed.

        A collective call.

        Raises:
            RunError: on all ranks: another run has taken the directory.
        """
        session = self.session

        def renew() -> None:
            if session.directory.renew() and self.metrics is not None:
                _write_facts(session)
                self.metrics.reopen()

        on_rank_0(session.world, renew)

    def write_saved(self, checkpoint: Path | None, progress: Progress) -> None:
        """Report a checkpoint that was published, in words and in status.json."""
        if checkpoint is not None:
            self.session.report(f"saved {checkpoint}")
            facts = {"step": progress.step, "tokens": progress.tokens, "checkpoint": checkpoint.name}
            self.session.directory.write_status("running", **facts)


@contextmanager
def open_records(session: Session, profile_steps: str | None) -> Iterator[Records]:
    """The records of an attempt, for the duration of the block; a collective call.

    Args:
        profile_steps: see `train.loop.train`

    Raises:
        RunError: on all ranks: the run's directory cannot be written.
    """
    config, world, speed = session.config, session.world, _speed(session)
    started: list[Metrics] = []
    on_rank_0(world, lambda: started.append(_start_metrics(session, speed)))
    metrics = started[0] if started else None
    try:
        _introduce(session, speed)
        enabled = config.log.breakdown
        # timing costs next to nothing on CPUs; on GPUs it waits for the device
        with timing(world.device, world.device.type == "cpu" if enabled is None else enabled) as timer:
            breakdown, profile = Breakdown(timer), _profile(session, profile_steps)
            yield Records(session=session, timer=timer, breakdown=breakdown, profile=profile, metrics=metrics)
        if timer.on:
            session.report(table(world.gather(breakdown.means())))
    finally:
        if metrics is not None:
            metrics.close()


def _start_metrics(session: Session, speed: Speed) -> Metrics:
    """Write the files that describe the run, and open those that get a row with every step."""
    directory = session.directory
    metrics = Metrics(directory.path, session.config, speed, directory.attempt, session.report)
    try:
        _write_facts(session)
        metrics.open(session.progress.step)
    except OSError as error:
        raise RunError(f"run.directory {directory.path}: cannot be written: {error}") from error
    return metrics


def _speed(session: Session) -> Speed:
    """What throughput is measured against; all ranks measure at the same time."""
    config, world = session.config, session.world
    peak, origin = peak_flops(world.device, session.engine.precision, config.log.peak_tflops)
    per_token = counts.flops_per_token(config.model, config.data.sequence_length)
    return Speed(flops_per_token=per_token, peak_flops=world.sum([peak])[0], peak_origin=origin)


def _write_facts(session: Session) -> None:
    """Write the run, its DeepSpeed config, tokenizer and data card, so that the directory needs no other files."""
    directory, data = session.directory.path, Path(session.config.data.directory or "")
    write_atomically(directory / RUN_FILE, write_yaml(session.record.config_as_dict))
    write_atomically(directory / DEEPSPEED_FILE, json.dumps(session.record.deepspeed, indent=2) + "\n")
    tokenizer = session.manifest.tokenizer
    copy_tokenizer(data / tokenizer.directory, directory / TOKENIZER, tokenizer.sha256)
    _copy_card(data / DATA_CARD_FILE, directory / DATA_CARD_FILE, session.report)


def _copy_card(source: Path, target: Path, report: Callable[[str], None]) -> None:
    """Copy the data card. It may come from somebody else, and run directories are published: a link is not followed."""
    try:
        if source.is_symlink():
            raise UntrustedFileError("is a link")
        content = read_bounded(source)
        if not isinstance(parse_json(content), dict):
            raise UntrustedFileError("is not a data card")
    except FileNotFoundError:
        return
    except (OSError, UntrustedFileError) as error:
        report(f"{source}: not copied into the run's directory: {error}")
        return
    write_atomically(target, content)


def _profile(session: Session, profile_steps: str | None) -> Profile:
    """The profile of the chosen steps, with what the formulas expect of a step."""
    config, world, final = session.config, session.world, session.record.deepspeed
    per_token = counts.flops_per_token(config.model, config.data.sequence_length)
    done, num_steps = session.progress.step, config.num_steps
    return Profile(
        steps=None if profile_steps is None else steps_to_profile(profile_steps, done, num_steps),
        folder=session.directory.path / PROFILE,
        rank=world.rank,
        expected=Expected(
            flops=per_token * config.tokens_per_step / world.data_size,
            communication=counts.communication_of_step(session.engine.table, final, session.engine.precision),
            ranks=world.data_size,
            compiled=config.train.compile,
        ),
        report=session.report,
    )


def _introduce(session: Session, speed: Speed) -> None:
    """Report what is about to run."""
    config, world, engine = session.config, session.world, session.engine
    count = counts.parameter_count(config.model, config.context_length)
    accumulation = session.record.deepspeed["gradient_accumulation_steps"]
    session.report(
        f"{config.run.name}: {short(count.total)} parameters, {world.size} ranks on {world.device.type} "
        f"(started by {world.ranks.launcher}; {num_threads()} threads and {session.cores}), "
        f"ZeRO stage {engine.stage}, {engine.precision}"
    )
    session.report(
        f"{short(config.tokens_per_step)} tokens a step ({accumulation} micro-batches of "
        f"{config.train.micro_batch_sequences} x {config.data.sequence_length} on each rank), {config.num_steps} steps; "
        f"MFU against {speed.peak_flops / 1e12:.3g} TFLOP/s ({speed.peak_origin})"
    )
    if session.saved is not None and (change := seam(session.progress.step, session.saved, config)):
        session.report(change)
