"""Real ranks look at themselves and each other: all see the same, and what is planted on one of them is found."""

import dataclasses

import pytest

from dsllm.doctor.collective_checks import Examination, examine
from dsllm.doctor.disks import Folder
from dsllm.doctor.findings import Finding
from dsllm.doctor.local_checks import Request, collect_local_facts
from tests.helpers.ranks import run_ranks

SMALL = 2**20
MEASURED = ("compute", "threads", "memory", "disk", "clock")
"""Checks whose result depends on what else this machine is doing."""


def ignore(text: str) -> None:
    """Take a progress message and drop it."""


def examined(world, folder: str) -> Examination:
    """Each rank as it is."""
    request = Request(folders=(Folder(role="run", path=folder),), test_bytes=SMALL)
    return examine(world, collect_local_facts(world.ranks), request, ignore)


def examined_with_faults(world, folders: list[str]) -> Examination:
    """Rank 1 claims another host and another torch, and sees another disk."""
    facts = collect_local_facts(world.ranks)
    if world.rank == 1:
        versions = {**facts.versions.versions, "torch": "1.0"}
        facts = dataclasses.replace(
            facts,
            place=dataclasses.replace(facts.place, host="elsewhere"),
            versions=dataclasses.replace(facts.versions, versions=versions),
        )
    own = folders[world.rank]
    return examine(world, facts, Request(folders=(Folder(role="run", path=own),), test_bytes=SMALL), ignore)


def surely(findings: list[Finding]) -> list[Finding]:
    """Those that do not depend on how busy this machine is."""
    return [finding for finding in findings if finding.check not in MEASURED]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_of_one_machine_agree(world_size, tmp_path):
    every = run_ranks(world_size, examined, str(tmp_path))
    first = every[0]
    assert all(dataclasses.replace(own, seconds=first.seconds) == first for own in every)
    assert [place.rank for place in first.ranks] == list(range(world_size)) and first.num_hosts == 1
    assert {finding.level for finding in surely(first.findings)} <= {"advice"}
    assert len(first.gemm) == world_size and all(rate > 0 for rate in first.gemm.values())
    assert len(first.collectives) == (0 if world_size == 1 else 8)
    ((folder,),) = first.folders.values()  # once for each host
    assert folder.write > 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_is_found_by_all(tmp_path):
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = run_ranks(2, examined_with_faults, folders)
    assert first.findings == second.findings and first.num_hosts == 2
    errors = [finding for finding in first.findings if finding.level == "error"]
    (torch,) = [finding for finding in errors if finding.check == "versions"]
    assert torch.where == "rank 1 on elsewhere" and torch.problem.startswith("torch is 1.0")
    assert first.findings[: len(errors)] == errors  # errors come first


def examined_on_two_hosts(world, folder: str) -> Examination:
    facts = collect_local_facts(world.ranks)
    facts = dataclasses.replace(facts, place=dataclasses.replace(facts.place, host=f"host{world.rank}"))
    return examine(world, facts, Request(folders=(Folder(role="run", path=folder),), test_bytes=SMALL), ignore)


@pytest.mark.slow
def test_a_folder_that_is_shared_is_not_blamed(tmp_path):
    found = run_ranks(2, examined_on_two_hosts, str(tmp_path))[0]
    assert len(found.folders) == 2 and not [f for f in found.findings if "another disk" in f.problem]
