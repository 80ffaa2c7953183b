"""dsllm launch: starts a run on a cluster under any launcher, follows it, and returns one true exit code."""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, get_args

from dsllm.config.cluster import ClusterConfig, Launcher
from dsllm.config.load import load_run
from dsllm.config.load_cluster import load_cluster
from dsllm.config.paths import find_file
from dsllm.errors import EXIT_INTERRUPTED, ConfigError, LaunchError
from dsllm.files import write_atomically
from dsllm.launch.batch import follow_batch, submit
from dsllm.launch.commands import make_launch
from dsllm.launch.exit_code import has_ended, outcome_of, read_patiently
from dsllm.launch.follow import StopRequest, Waits, follow, stop_signals
from dsllm.launch.job import Job, Launch, quoted
from dsllm.train.run_directory import read_status

OUTPUT_FILE = "output.log"


def main(arguments: Sequence[str]) -> int:
    """`dsllm launch [RUN] [key=value ...] [--cluster FILE] [--with LAUNCHER] [--dry-run]`; the exit code of the run."""
    options = _parse(arguments)
    cluster = load_cluster(options.cluster, options.hostfile, options.launcher)
    job = _make_job(options, cluster)
    plan = make_launch(job, cluster)
    if options.dry_run:
        _show(plan)
        return 0
    _check_programs(plan)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for path, text in plan.files.items():
            write_atomically(path, text)
    except OSError as error:
        raise LaunchError(f"{job.folder}: cannot be written: {error.strerror or error}") from error
    return _run(job, cluster, plan)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm launch",
        description="Start a run on a cluster, follow it, and return its exit code: 0 trained, 75 saved after a signal.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="RUN | key=value", help="the run's YAML file, and fields to change in it"
    )
    parser.add_argument("--cluster", metavar="FILE", help="the cluster's YAML file; nothing: this machine")
    parser.add_argument(
        "--hostfile", metavar="FILE", help="hosts, a line `NAME slots=N` each, in place of the cluster's"
    )
    parser.add_argument(
        "--with", dest="launcher", choices=get_args(Launcher), help="the launcher; nothing: as the cluster's file says"
    )
    parser.add_argument("--dry-run", action="store_true", help="show every file and command; write and start nothing")
    options = parser.parse_intermixed_args(list(arguments))
    options.overrides = [word for word in options.words if "=" in word]
    files = [word for word in options.words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one config file at a time, but there are {len(files)}: {', '.join(files)}")
    options.config = files[0] if files else None
    return options


def _make_job(options: argparse.Namespace, cluster: ClusterConfig) -> Job:
    """The run is read here already, so that what is wrong with it costs no start."""
    config = load_run(options.config, options.overrides)
    file = find_file(options.config, None) if options.config else None
    directory = Path(cluster.shared_directory or Path.cwd())
    return Job(
        name=f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        run_name=config.run.name,
        words=tuple([str(file.absolute())] if file else []) + tuple(options.overrides),
        directory=directory,
        run_directory=directory / config.run.directory,
    )


def _show(plan: Launch) -> None:
    for path, text in plan.files.items():
        print(f"# file {path}\n{text}")
    for host, words in plan.commands.items():
        print(f"# command for {host}\n{quoted(words)}")


def _check_programs(plan: Launch) -> None:
    for program in {words[0] for words in plan.commands.values()}:
        if shutil.which(program) is None:
            raise LaunchError(f"{program}: no such program here; it starts this job")


def _run(job: Job, cluster: ClusterConfig, plan: Launch) -> int:
    """Start, follow, judge."""
    waits = Waits(save=cluster.timeouts.save_seconds, end=cluster.timeouts.end_seconds)
    before = read_status(job.run_directory)
    print(f"job {job.name}: files and output in {job.folder}", flush=True)
    with stop_signals() as asked, (job.folder / OUTPUT_FILE).open("wb") as log:
        write = partial(_write, log)
        if cluster.chosen_launcher == "slurm":
            codes = [_run_batch(job, plan, waits, asked, write)]
        else:
            codes = list(follow(plan.commands, waits, asked, partial(_over, job, before), write).values())
        verdict = outcome_of(before, read_patiently(partial(read_status, job.run_directory)), codes, asked.by)
        if plan.sweeps and verdict.code not in (0, EXIT_INTERRUPTED):
            follow(plan.sweeps, waits, StopRequest(), _yes, write)
    with contextlib.suppress(BrokenPipeError):
        print(f"dsllm launch: {verdict.reason}", file=sys.stderr, flush=True)
    return verdict.code


def _yes() -> bool:
    """The run is over: a sweep has end_seconds."""
    return True


def _run_batch(job: Job, plan: Launch, waits: Waits, asked: StopRequest, write: Callable[[bytes], None]) -> int:
    (command,) = plan.commands.values()
    number = submit(command)
    print(f"job {number} is with SLURM", flush=True)
    return follow_batch(number, job.folder / f"slurm-{number}.log", waits, asked, write).exit_code


def _over(job: Job, before: dict) -> bool:
    return has_ended(before, partial(read_status, job.run_directory))


def _write(log: IO[bytes], data: bytes) -> None:
    """To the job's log and to the terminal; a terminal that has gone does not end the job."""
    log.write(data)
    log.flush()
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
