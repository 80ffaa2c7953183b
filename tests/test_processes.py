"""Processes of one machine: a port that is free, children that end with their parent, cores that a quota leaves."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsllm.processes import cpu_quota, end_with_parent, free_port, num_cores, own_cores

PARENT = """
import multiprocessing, sys, time
from tests.test_processes import wait_for_ever
if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=wait_for_ever, daemon=True)
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


def wait_for_ever() -> None:
    """What a child does that nobody ends."""
    end_with_parent()
    time.sleep(600)


def test_a_free_port_can_be_used():
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_ends_when_its_parent_is_killed(tmp_path, method):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), method]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(20)  # raises when it is still there


def test_only_a_child_can_end_with_its_parent():
    assert multiprocessing.parent_process() is None
    with pytest.raises(AssertionError, match="only a child"):
        end_with_parent()


def limit(root: Path, group: str, quota: str) -> None:
    """Write a limit as control groups of version 2 do."""
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{quota} 100000\n")


def limit_v1(root: Path, group: str, quota: int) -> None:
    folder = root / "sys/fs/cgroup/cpu" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")


def belong_to(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_without_a_limit_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None and num_cores(tmp_path) == len(own_cores())
    limit(tmp_path, "", "max")
    limit_v1(tmp_path, "", -1)
    assert cpu_quota(tmp_path) is None


def test_the_limit_of_a_container_counts(tmp_path):
    limit(tmp_path, "", "150000")
    assert cpu_quota(tmp_path) == 1.5 and num_cores(tmp_path) == 1
    limit(tmp_path, "", "50000")
    assert num_cores(tmp_path) == 1  # a process needs a core, however little of its time it gets


@pytest.mark.parametrize("lines", [("0::/jobs/one",), ("4:cpu,cpuacct:/jobs/one", "0::/elsewhere")])
def test_the_tightest_limit_above_the_process_counts(tmp_path, lines):
    belong_to(tmp_path, "9:memory:/other", *lines)
    for group, cores in (("jobs/one", 8), ("jobs", 3), ("other", 1)):
        (limit if len(lines) == 1 else limit_v1)(tmp_path, group, cores * 100000)
    assert cpu_quota(tmp_path) == 3


def test_a_group_that_is_not_seen_here_is_skipped(tmp_path):
    """Docker without a namespace of its own: the path is the host's, the folder the container's."""
    belong_to(tmp_path, "1:cpu:/docker/abc")
    limit_v1(tmp_path, "", 200000)
    assert cpu_quota(tmp_path) == 2
