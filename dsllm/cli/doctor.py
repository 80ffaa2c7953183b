"""dsllm doctor, and launch/doctor.py: checks machines, installation and network on every rank; with --parity the numbers."""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from dsllm import counts
from dsllm.cli.doctor_report import alone_as_json, as_json, show, verdict
from dsllm.cli.dry_run import with_some_vocabulary
from dsllm.config.load import load_run
from dsllm.config.run import RunConfig
from dsllm.doctor.alone import Alone, Request, cannot_import, cannot_join, judge_alone, look_alone
from dsllm.doctor.disks import Folder
from dsllm.doctor.findings import Finding
from dsllm.doctor.network import why_unreachable
from dsllm.engine.processes.ranks import discover_ranks
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.errors import EXIT_FAILED, ConfigError, LaunchError
from dsllm.files import write_atomically

WIDTH_IN_FILES = 140
"""Columns where no terminal tells its own."""
BYTES_PER_PARAMETER = 12
"""In a checkpoint: fp32 weights and Adam's two moments."""


def main(arguments: Sequence[str]) -> int:
    """`dsllm doctor [RUN.yaml] [key=value ...]`, under any launcher; 0 where nothing is wrong, advice aside."""
    options = _parse(arguments)
    if options.parity:
        return int(importlib.import_module("dsllm.cli.parity").run(options, arguments))
    ranks = discover_ranks()
    request = _request(options)
    console = _console(ranks.rank, options.json)
    alone = look_alone(ranks)
    with console.status("importing torch and DeepSpeed") as status:
        try:  # takes seconds, and fails where something is broken: then what is known without it is told
            together = importlib.import_module("dsllm.doctor.together")
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return _tell_alone(alone, cannot_import(alone.place, error), options.json)
        try:
            examination = together.examine_together(ranks, alone, request, status.update)
        except LaunchError as error:
            reason = why_unreachable(ranks.master_address, ranks.master_port) if ranks.rank else ""
            return _tell_alone(alone, cannot_join(alone.place, reason, error), options.json)
    if ranks.rank == 0:
        show(examination, console)
        _write_json(options.json, as_json(examination))
    return EXIT_FAILED if any(finding.level == "error" for finding in examination.findings) else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm doctor",
        description="Check versions, devices, limits, disks, clocks, network and speed on every rank, and say what to do. "
        "On several ranks: deepspeed --num_gpus 2 launch/doctor.py, or python -m dsllm doctor under torchrun, srun or mpirun.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="RUN.yaml | key=value", help="the run whose folders and needs are looked at as well"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; -: to the standard output")
    parser.add_argument(
        "--timeout-minutes", type=float, default=2.0, help="longest wait for another rank (default 2 minutes)"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it
    parity = parser.add_argument_group("the numbers")
    parity.add_argument(
        "--parity",
        action="store_true",
        help="instead: train a small model through the engine and through plain PyTorch, in every combination of "
        "settings, and compare; on GPUs where there are any; minutes",
    )
    parity.add_argument("--quick", action="store_true", help="only the pairwise cover: a third of the rows")
    parity.add_argument("--world-sizes", type=_numbers, metavar="1,2,4", help="numbers of ranks to run on")
    parity.add_argument("--only", default="", metavar="TEXT", help="only combinations whose name has these words")
    parity.add_argument("--seed", type=int, default=7, help="of the samples and the initial weights (default 7)")
    parity.add_argument("--write", type=Path, metavar="FILE", help="write the table as markdown (docs/parity.md)")
    options = parser.parse_intermixed_args(list(arguments))
    if options.timeout_minutes <= 0:
        parser.error(f"--timeout-minutes {options.timeout_minutes:g}: must be more than 0")
    given = [name for name in ("quick", "world_sizes", "only", "write") if getattr(options, name)]
    if given and not options.parity:
        parser.error(f"--{given[0].replace('_', '-')} belongs to --parity")
    if options.words and options.parity:
        parser.error(f"{options.words[0]}: --parity brings runs of its own")
    return options


def _numbers(text: str) -> list[int]:
    allowed = importlib.import_module("dsllm.parity.combinations").WORLD_SIZES
    numbers = [int(word) for word in text.split(",")]
    if unknown := [n for n in numbers if n not in allowed]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} ranks are not in the table: it has {allowed}")
    return numbers


def _request(options: argparse.Namespace) -> Request:
    """What is looked at: the run's folders and what it needs, or the working directory."""
    timeout = timedelta(minutes=options.timeout_minutes)
    if not options.words:
        return Request(folders=(Folder(role="run", path="."),), timeout=timeout)
    files = [word for word in options.words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one config file at a time, but there are {len(files)}: {', '.join(files)}")
    file = files[0] if files else None
    config = load_run(file, [word for word in options.words if "=" in word])
    given = read_deepspeed_json(config.deepspeed, beside=file and Path(file).parent)
    return Request(
        folders=(*_folders_of(config), *_nvme_folders(given)),
        operators=frozenset(("async_io", "pin_memory") if _nvme_folders(given) else ()),
        timeout=timeout,
        bind_cores=config.train.bind_cores,
    )


def _folders_of(config: RunConfig) -> tuple[Folder, Folder]:
    counted, _ = with_some_vocabulary(config)
    parameters = counts.parameter_count(counted.model, counted.context_length).total
    run = Folder(
        role="run",
        path=config.run.directory,
        needed_bytes=BYTES_PER_PARAMETER * parameters,
        num_kept=config.checkpoint.keep_last,
    )
    return run, Folder(role="data", path=config.data.directory or "")


def _nvme_folders(given: Mapping[str, Any]) -> tuple[Folder, ...]:
    zero = given.get("zero_optimization", {})
    blocks = [zero.get(key, {}) for key in ("offload_optimizer", "offload_param")]
    paths = {str(b["nvme_path"]) for b in blocks if b.get("device") == "nvme" and "nvme_path" in b}
    return tuple(Folder(role="nvme", path=path) for path in sorted(paths))


def _console(rank: int, json_file: str | None) -> Console:
    """Rank 0's; the others are quiet."""
    console = Console(stderr=json_file == "-", quiet=rank != 0)
    return console if console.is_terminal else Console(stderr=json_file == "-", quiet=rank != 0, width=WIDTH_IN_FILES)


def _tell_alone(alone: Alone, problem: Finding, json_file: str | None) -> int:
    """What one rank knows, where it could not talk to the others; the exit code."""
    findings = [problem, *judge_alone(alone)]
    for finding in findings:
        print(f"dsllm doctor: {finding}", file=sys.stderr, flush=True)
    if alone.place.rank == 0:
        print(f"dsllm doctor: {verdict(findings)}", file=sys.stderr, flush=True)
        _write_json(json_file, alone_as_json(alone, findings))
    return EXIT_FAILED


def _write_json(file: str | None, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    if file == "-":
        print(text, end="", flush=True)
    elif file:
        write_atomically(Path(file), text)
