"""dsllm launch: starts a run on a cluster under any launcher, follows it, and returns the run's own exit code."""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, get_args

from dsllm.cli.output import Report, add_json_option, json_report
from dsllm.cli.terminal import silence
from dsllm.cli.words import RunWords, add_run_words, parse_run_words
from dsllm.config.cluster import ClusterConfig, Launcher
from dsllm.config.paths import find_file
from dsllm.errors import EXIT_INTERRUPTED, LaunchError
from dsllm.files import write_atomically

if TYPE_CHECKING:  # imported when the command runs
    from dsllm.launch.exit_code import Outcome
    from dsllm.launch.follow import StopRequest, Waits
    from dsllm.launch.job import Job, Launch

OUTPUT_FILE = "output.log"


def main(arguments: list[str]) -> int:
    """`dsllm launch [RUN] [key=value ...] [--cluster FILE] [--with LAUNCHER] [--dry-run]`; returns the run's exit code."""
    options = _parse(arguments)
    words = parse_run_words(options.words)
    with json_report(options.json) as report:
        return _launch(options, words, report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm launch",
        description="Start a run on a cluster, follow it, and return its exit code: 0 trained, 75 saved after a signal.",
    )
    add_run_words(parser)
    parser.add_argument("--cluster", metavar="FILE", help="the cluster's YAML file; default: this machine")
    parser.add_argument(
        "--hostfile", metavar="FILE", help="hosts, a line `NAME slots=N` each, in place of the cluster's"
    )
    parser.add_argument(
        "--with",
        dest="launcher",
        choices=get_args(Launcher),
        help="the launcher; default: the one in the cluster's file",
    )
    parser.add_argument("--dry-run", action="store_true", help="show every file and command; write and start nothing")
    add_json_option(
        parser, "job, exit code, reason and files (with --dry-run: the contents of the files, and the commands)"
    )
    return parser.parse_intermixed_args(arguments)


def _launch(options: argparse.Namespace, words: RunWords, report: Report) -> int:
    from dsllm.config.load_cluster import load_cluster
    from dsllm.launch.commands import make_launch

    cluster = load_cluster(options.cluster, options.hostfile, options.launcher)
    job = _make_job(words, cluster)
    launch = make_launch(job, cluster)
    if options.dry_run:
        _show(launch)
        report(_planned(job, launch))
        return 0
    _check_programs(launch, cluster)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for path, text in launch.files.items():
            write_atomically(path, text)
    except OSError as error:
        raise LaunchError(f"{job.folder}: cannot be written: {error.strerror or error}") from error
    outcome = _run(job, cluster, launch)
    with contextlib.suppress(BrokenPipeError):
        print(f"dsllm launch: {outcome.reason}", file=sys.stderr, flush=True)
    report(_ended(job, launch, outcome))
    return outcome.code


def _make_job(words: RunWords, cluster: ClusterConfig) -> "Job":
    """The job of a run. Reads the run and its DeepSpeed JSON, so that mistakes are found before anything starts."""
    from dsllm.cli.launch_checks import check_ranks, notes
    from dsllm.config.load import load_run
    from dsllm.engine.settings.json_file import read_deepspeed_json
    from dsllm.launch.job import Job

    config = load_run(words.file, words.overrides)
    file = find_file(words.file) if words.file else None
    check_ranks(config, read_deepspeed_json(config.deepspeed, file.parent if file else None), cluster)
    directory = Path(cluster.shared_directory or Path.cwd())
    for note in notes(config, file, cluster, directory):
        _note(note)
    return Job(
        name=f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        run_name=config.run.name,
        words=(*([str(file.absolute())] if file else []), *words.overrides),
        directory=directory,
        run_directory=directory / config.run.directory,
    )


def _show(launch: "Launch") -> None:
    from dsllm.launch.job import quoted

    for path, text in launch.files.items():
        print(f"# file {path}\n{text}")
    for host, command in launch.commands.items():
        print(f"# command for {host}\n{quoted(command)}")


def _planned(job: "Job", launch: "Launch") -> dict[str, Any]:
    """A dry run as plain values."""
    return {
        "job": job.name,
        "run_directory": str(job.run_directory),
        "files": {str(path): text for path, text in launch.files.items()},
        "commands": {host: list(command) for host, command in launch.commands.items()},
    }


def _ended(job: "Job", launch: "Launch", outcome: "Outcome") -> dict[str, Any]:
    """A job that has ended as plain values."""
    return {
        "job": job.name,
        "run_directory": str(job.run_directory),
        "exit_code": outcome.code,
        "reason": outcome.reason,
        "files": [str(path) for path in [*launch.files, job.folder / OUTPUT_FILE]],
    }


def _check_programs(launch: "Launch", cluster: ClusterConfig) -> None:
    from dsllm.launch.mpi import refuse_other_mpi

    if cluster.chosen_launcher == "mpi":
        refuse_other_mpi(cluster)
    for program in {command[0] for command in launch.commands.values()}:
        if shutil.which(program) is None:
            raise LaunchError(f"{program}: there is no such program here, and it starts this job")


def _run(job: "Job", cluster: ClusterConfig, launch: "Launch") -> "Outcome":
    """Start the job, follow it to its end, and derive its exit code."""
    from dsllm.launch.exit_code import has_ended, outcome_of
    from dsllm.launch.follow import StopRequest, Waits, follow, stop_signals
    from dsllm.launch.remaining import Remaining
    from dsllm.run_directory import read_status, status_or_nothing

    waits = Waits(save=cluster.timeouts.save_seconds, end=cluster.timeouts.end_seconds)
    before = status_or_nothing(job.run_directory, _note)

    def run_has_ended() -> bool:
        return has_ended(before, partial(read_status, job.run_directory))

    print(f"job {job.name}: files and output in {job.folder}", flush=True)
    with stop_signals() as request, (job.folder / OUTPUT_FILE).open("wb", buffering=0) as log:
        write = _Output(log).write
        if cluster.chosen_launcher == "slurm":
            codes = [_run_batch(job, launch, waits, request, write)]
        else:
            codes = list(follow(launch.commands, waits, request, run_has_ended, write).values())
        after = Remaining(job.name, job.run_directory, before).status(waits, _note)
        outcome = outcome_of(before, after, codes, request.by)
        if launch.sweeps and outcome.code not in (0, EXIT_INTERRUPTED):
            follow(launch.sweeps, waits, StopRequest(), _yes, write)
    return outcome


def _note(text: str) -> None:
    print(f"dsllm launch: note: {text}", file=sys.stderr, flush=True)


def _yes() -> bool:
    """The run is over, so a sweep gets end_seconds."""
    return True


def _run_batch(
    job: "Job", launch: "Launch", waits: "Waits", request: "StopRequest", write: Callable[[bytes], None]
) -> int:
    """Submit the job to SLURM and follow it; returns the exit code of its script."""
    from dsllm.launch.batch import follow_batch, submit

    (command,) = launch.commands.values()
    number = submit(command)
    print(f"SLURM has accepted the job as {number}", flush=True)
    return follow_batch(number, job.folder / f"slurm-{number}.log", waits, request, write).exit_code


@dataclass
class _Output:
    """Passes on what the job prints, to its log and to the terminal: neither a full disk nor a closed terminal ends the job."""

    log: IO[bytes] | None

    def write(self, data: bytes) -> None:
        if self.log is not None:
            try:
                self.log.write(data)
            except OSError as error:
                self.log = None
                _note(f"{OUTPUT_FILE} ends here, the job continues: {error.strerror or error}")
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError:
            silence()
