"""What `dsllm --help` and `dsllm COMMAND --help` cost: user and system time of a new process, the median of several.

    python -m bench.help_time [--repeats 5] [--write]

The kernel counts the time of each child process (wait4), so other programs on the machine hardly matter. The first
start of each command is left out, because it fills the file cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

from bench import report
from bench.rounds import machine
from dsllm.cli import COMMANDS

MOST_SECONDS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="starts of each command that are counted (default 5)")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    options = parser.parse_args()
    measured = {}
    for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
        seconds = [cpu_seconds([sys.executable, "-m", "dsllm", *words]) for _ in range(options.repeats + 1)]
        measured[" ".join(["dsllm", *words])] = seconds[1:]
    record = {"machine": machine(), "most_seconds": MOST_SECONDS, "seconds": measured}
    text = "\n".join([*table(measured), "", report.conditions(record["machine"])])
    report.keep("help_time", record, {"": text}, options.write)
    return 0


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of a command and of the processes that it waited for, in seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return usage.ru_utime + usage.ru_stime


def table(measured: dict[str, list[float]]) -> list[str]:
    """A row for each command."""
    lines = [f"| command | user + system time, s (median of {len(next(iter(measured.values())))}) | |", "|---|---|---|"]
    for command, seconds in measured.items():
        median = statistics.median(seconds)
        outcome = "within" if median < MOST_SECONDS else "**above**"
        lines.append(f"| `{command}` | {median:.3f} | {outcome} {MOST_SECONDS:g} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
