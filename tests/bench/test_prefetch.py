"""The table of bench/prefetch.py, and the library that delays reads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import prefetch


def runs(milliseconds: float, without: float, wait: float, within: float) -> list[prefetch.Measured]:
    """Two rounds of made-up runs, the second on a machine half as fast."""
    found = []
    for slow in (1.0, 2.0):
        for on, step, data in ((False, without, wait), (True, within, 0.0)):
            steps, waits = [slow * step] * 3, [slow * data] * 3
            found.append(
                prefetch.Measured(milliseconds=milliseconds, prefetch=on, step_seconds=steps, data_seconds=waits)
            )
    return found


def test_a_row_compares_the_runs_of_one_round() -> None:
    header, line, quick, slow = prefetch.table([*runs(0, 0.3, 0.0, 0.3), *runs(5, 0.5, 0.16, 0.25)])
    assert quick == "| 0 ms | 0.450 | 0.000 | 0.450 | 0.000 | 1.00 | 1.00 to 1.00 | 6 |"
    assert slow == "| 5 ms | 0.750 | 0.240 | 0.375 | 0.000 | 2.00 | 2.00 to 2.00 | 6 |"
    assert len({row.count("|") for row in (header, line, quick, slow)}) == 1


READS = """
import os, sys, time
for name in sys.argv[1:]:
    descriptor = os.open(name, os.O_RDONLY)
    began = time.perf_counter()
    content = [os.pread(descriptor, 1, offset) for offset in range(3)]
    print(content == [b"a", b"b", b"c"], time.perf_counter() - began)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="LD_PRELOAD needs Linux, and building it gcc"
)
def test_only_reads_of_bin_files_are_delayed(tmp_path: Path) -> None:
    library = prefetch.build_library(tmp_path)
    files = [tmp_path / "shard.bin", tmp_path / "shard.idx"]
    for file in files:
        file.write_bytes(b"abc")
    environment = os.environ | {"LD_PRELOAD": str(library), "SLOW_READS_MS": "200"}
    command = [sys.executable, "-c", READS, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (bin_is_right, bin_seconds), (idx_is_right, idx_seconds) = (line.split() for line in done.stdout.splitlines())
    assert bin_is_right == idx_is_right == "True"
    assert float(bin_seconds) >= 0.6 > float(idx_seconds)
