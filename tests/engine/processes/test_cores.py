"""A rank's cores: a fair share, near each other, and never more than the launcher gave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsllm.engine.processes.cores import as_list, cores_by_node, cores_of_rank, numbers_in

HERE = sorted(os.sched_getaffinity(0))


def host(root: Path, *nodes: str) -> Path:
    for number, cores in enumerate(nodes):
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
    return root


def test_the_ranks_of_a_host_share_its_cores(tmp_path):
    root = host(tmp_path, as_list(tuple(HERE)))
    shares = [cores_of_rank(rank, len(HERE), None, root) for rank in range(len(HERE))]
    assert {share.num_threads for share in shares} == {1}
    assert sorted(core for share in shares for core in share.numbers) == HERE
    assert {share.bound_by for share in shares} == {"nobody"}
    everything = cores_of_rank(0, 1, None, root)
    assert everything.numbers == tuple(HERE) and everything.num_threads == len(HERE)


def test_more_ranks_than_cores_take_one_each(tmp_path):
    shares = [cores_of_rank(rank, 3 * len(HERE), None, host(tmp_path / str(rank), "0")) for rank in range(3)]
    assert all(len(share.numbers) == 1 for share in shares)


def test_a_quota_is_shared_too(tmp_path):
    root = host(tmp_path, as_list(tuple(HERE)))
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("100000 100000\n")
    cores = cores_of_rank(0, 1, False, root)
    assert cores.numbers == tuple(HERE) and cores.num_threads == 1
    assert cores_of_rank(0, len(HERE) + 1, False, root).num_threads == 1  # each rank needs a thread


@pytest.mark.skipif(len(HERE) < 2, reason="needs two cores")
def test_shares_follow_the_memory_nodes(tmp_path):
    """The last core is on node 0 here: it comes first."""
    root = host(tmp_path, as_list((HERE[-1],)), as_list(tuple(HERE[:-1])))
    assert cores_by_node(root)[0] == (HERE[-1],)
    assert cores_of_rank(0, len(HERE), False, root).numbers == (HERE[-1],)


BIND = """
import os, sys
from pathlib import Path
from dsllm.engine.processes.cores import cores_of_rank
cores = cores_of_rank(1, 2, None if sys.argv[1] == "None" else sys.argv[1] == "True", Path(sys.argv[2]))
print(cores.bound_by, len(os.sched_getaffinity(0)), len(cores.numbers))
"""


@pytest.mark.skipif(len(HERE) < 2, reason="needs two cores")
@pytest.mark.parametrize(("asked", "nodes", "bound"), [("True", 1, True), ("None", 1, False), ("None", 2, True)])
def test_binding(tmp_path, asked, nodes, bound):
    half = len(HERE) // 2
    lists = [as_list(tuple(HERE[:half])), as_list(tuple(HERE[half:]))] if nodes == 2 else [as_list(tuple(HERE))]
    command = [sys.executable, "-c", BIND, asked, str(host(tmp_path, *lists))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["dsllm", str(half), str(half)] if bound else ["nobody", str(len(HERE)), str(half)])


@pytest.mark.skipif(len(HERE) < 2, reason="needs two cores")
def test_what_the_launcher_has_bound_stays(tmp_path):
    """All of its cores are then the rank's own, however many ranks the host has."""
    command = ["taskset", "-c", str(HERE[0]), sys.executable, "-c", BIND, "True", str(host(tmp_path, "0"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["the", "launcher", "1", "1"]


def test_lists_of_numbers():
    assert list(numbers_in("0-3,8")) == [0, 1, 2, 3, 8] and as_list((8, 0, 1, 2, 3)) == "0-3,8"
