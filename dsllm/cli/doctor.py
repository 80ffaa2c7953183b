"""dsllm doctor, and launch/doctor.py: checks machines, installation and network on every rank."""

import argparse
import sys
from typing import TYPE_CHECKING

from dsllm.cli.output import Report, add_json_option, json_report
from dsllm.cli.words import add_run_words, parse_run_words
from dsllm.errors import EXIT_FAILED, LaunchError

if TYPE_CHECKING:  # imported when the command runs
    from rich.console import Console

    from dsllm.doctor.findings import Finding
    from dsllm.doctor.local_checks import LocalFacts, Request
    from dsllm.engine.processes.ranks import Ranks

PARITY = "--parity"
WIDTH_IN_FILES = 140
"""Columns of the output where it is not a terminal."""


def main(arguments: list[str]) -> int:
    """`dsllm doctor [RUN.yaml] [key=value ...]`, under any launcher; returns 0 where there is no error, advice or not."""
    if PARITY in arguments:
        from dsllm.cli import parity

        return parity.main([word for word in arguments if word != PARITY])
    options = _parse(arguments)
    words = parse_run_words(options.words)
    from dsllm.cli.doctor_request import make_request
    from dsllm.engine.processes.ranks import discover_ranks

    ranks = discover_ranks()
    request = make_request(words, options.timeout_minutes)
    with json_report(options.json, writes=ranks.rank == 0) as report:
        return _run(ranks, request, report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm doctor",
        description="Check versions, devices, limits, disks, clocks, network and speed on every rank, and say what to do. "
        "On several ranks: deepspeed --num_gpus 2 launch/doctor.py, or python -m dsllm doctor under torchrun, srun or mpirun.",
        allow_abbrev=False,  # main looks for the whole word --parity
    )
    add_run_words(parser, "a run, to check its folders and what it needs as well")
    add_json_option(parser, "all measurements and findings")
    parser.add_argument(
        "--timeout-minutes", type=float, default=2.0, help="longest wait for another rank (default 2 minutes)"
    )
    parser.add_argument(PARITY, action="store_true", help="the same as `dsllm parity`, and takes its options")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it
    options = parser.parse_intermixed_args(arguments)
    if options.timeout_minutes <= 0:
        parser.error(f"--timeout-minutes {options.timeout_minutes:g}: must be more than 0")
    return options


def _run(ranks: "Ranks", request: "Request", report: Report) -> int:
    """Check this rank, then all ranks together."""
    from dsllm.cli.doctor_report import as_json, show
    from dsllm.doctor.local_checks import cannot_import, cannot_join, collect_local_facts
    from dsllm.doctor.network import why_unreachable

    console = _console(ranks.rank)
    facts = collect_local_facts(ranks)
    with console.status("importing torch and DeepSpeed") as status:
        try:  # an installation may be broken in many ways; the checks above have run all the same
            from dsllm.doctor.collective_checks import examine_all_ranks
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return _report_locally(facts, cannot_import(facts.place, error), report)
        try:
            examination = examine_all_ranks(ranks, facts, request, status.update)
        except LaunchError as error:
            reason = why_unreachable(ranks.master_address, ranks.master_port) if ranks.rank else ""
            return _report_locally(facts, cannot_join(facts.place, reason, error), report)
    if ranks.rank == 0:
        show(examination, console)
        report(as_json(examination))
    return EXIT_FAILED if any(finding.level == "error" for finding in examination.findings) else 0


def _console(rank: int) -> "Console":
    """The console of rank 0; the other ranks print nothing on theirs."""
    from rich.console import Console

    console = Console(quiet=rank != 0)
    return console if console.is_terminal else Console(quiet=rank != 0, width=WIDTH_IN_FILES)


def _report_locally(facts: "LocalFacts", problem: "Finding", report: Report) -> int:
    """Report what one rank found where it could not reach the others; returns the exit code."""
    from dsllm.cli.doctor_report import conclusion, local_as_json
    from dsllm.doctor.local_checks import check_locally

    findings = [problem, *check_locally(facts)]
    for finding in findings:
        print(f"dsllm doctor: {finding}", file=sys.stderr, flush=True)
    if facts.place.rank == 0:
        print(f"dsllm doctor: {conclusion(findings)}", file=sys.stderr, flush=True)
        report(local_as_json(facts, findings))
    return EXIT_FAILED
