"""Limits, threads, memory and /dev/shm that would stop or slow a run are found, from the kernel's own numbers."""

import dataclasses
import os
import resource

import pytest

from dsllm.byte_units import GIB
from dsllm.doctor.machine import UNLIMITED, check_machines, look_at_machine, numa_nodes
from tests.doctor.test_findings import places

PLENTY = dataclasses.replace(
    look_at_machine(threads=1),
    cores=(0, 1),
    quota_cores=None,
    numa_nodes=(0,),
    memory_total=64 * GIB,
    memory_available=60 * GIB,
    memory_limit=None,
    open_files=65536,
    open_files_hard=65536,
    shm_total=32 * GIB,
    shm_free=32 * GIB,
)
"""A host without fault."""
HERE, NEIGHBOUR = places("a", "a")


def judge(device: str = "cpu", ranks=(HERE, NEIGHBOUR), **changes):
    return list(check_machines({place: dataclasses.replace(PLENTY, **changes) for place in ranks}, device))


def test_a_host_without_fault_has_no_findings():
    assert not judge("cpu") and not judge("cuda")


def test_this_host_is_seen_as_it_is():
    seen = look_at_machine()
    assert seen.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert 0 < seen.memory_available <= seen.memory_total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_low_limit_on_open_files_is_found():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        seen = look_at_machine()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert seen.open_files == 128
    (found,) = judge(ranks=[HERE], open_files=seen.open_files)
    assert found.level == "error" and "at most 128 files" in found.problem and "ulimit -n" in found.action
    assert "ask the administrator" in judge(ranks=[HERE], open_files=128, open_files_hard=256)[0].action
    many = places(*["a"] * 64)
    assert judge(ranks=many, open_files=1024)[0].level == "advice"  # enough for a few ranks, not for these


@pytest.mark.parametrize("changes, level", [({"threads": 2}, "advice"), ({"quota_cores": 1.0}, "advice")])
def test_more_threads_than_cores_are_found(changes, level):
    (found,) = judge(**changes)
    assert found.check == "threads" and found.level == level and "OMP_NUM_THREADS=1" in found.action


def test_memory_that_is_used_or_limited_is_reported():
    (used,) = judge(memory_available=2 * GIB)
    assert used.problem == "only 2.0 of 64.0 GiB are free"
    (limited,) = judge(memory_limit=8 * GIB)
    assert limited.problem == "the control group allows 8.0 of 64.0 GiB"


def test_a_container_s_shared_memory_is_too_small_for_nccl():
    (found,) = judge("cuda", shm_free=64 * 2**20)
    assert found.level == "error" and "--shm-size" in found.action
    assert not judge("cpu", shm_free=64 * 2**20)  # gloo does not use it
    assert not judge("cuda", ranks=[HERE], shm_free=64 * 2**20)


def test_a_rank_over_several_memory_nodes_is_reported():
    (found,) = judge(numa_nodes=(0, 1))
    assert found.check == "NUMA" and found.where == "ranks 0-1 on a"
    seen = {HERE: PLENTY, NEIGHBOUR: dataclasses.replace(PLENTY, numa_nodes=(1, 2))}
    (found,) = check_machines(seen, "cpu")
    assert found.where == "rank 1 on a" and "memory nodes 1-2" in found.problem


def test_what_the_kernel_writes_is_read(tmp_path):
    for node, cores in (("node0", "0-3,8"), ("node1", "4-7")):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
        (tmp_path / "sys/devices/system/node" / node / "cpulist").write_text(cores + "\n")
    assert numa_nodes((2, 8), tmp_path) == (0,) and numa_nodes((3, 4), tmp_path) == (0, 1)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text(f"{GIB}\n")
    seen = look_at_machine(root=tmp_path)
    assert seen.quota_cores == 1.5 and seen.memory_limit == GIB and seen.shm_total == 0
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    seen = look_at_machine(root=tmp_path)
    assert seen.quota_cores is None and seen.memory_limit is None
    assert seen.memory_total < UNLIMITED
