"""Checks that all ranks make together: compares what they see, then measures clocks, disks, matrix products, collectives."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dsllm.config.precision import resolve_precision
from dsllm.doctor.clocks import Offsets, check_clocks, measure_offsets
from dsllm.doctor.disks import FolderFacts, check_disks, look_at_marker, marker, try_folder
from dsllm.doctor.findings import Finding, Place, one_per_host
from dsllm.doctor.gpus import check_gpus, has_driver
from dsllm.doctor.local_checks import LocalFacts, Request
from dsllm.doctor.machine import check_machines, look_at_machine
from dsllm.doctor.network import check_networks
from dsllm.doctor.operators import check_operators
from dsllm.doctor.speed import check_collectives, check_gemm, measure_gemm
from dsllm.doctor.versions import check_versions
from dsllm.engine.instruments.bandwidth import SIZES, CollectiveTime, measure_collectives
from dsllm.engine.instruments.operators import Operators, look_at_operators
from dsllm.engine.processes.device import (
    Gpu,
    choose_device,
    compute_dtype,
    gpu_of,
    library_versions,
    num_threads,
    set_up_process,
)
from dsllm.engine.processes.process_group import World, lost_ranks_named, process_group
from dsllm.engine.processes.ranks import Ranks

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank sees, its device included."""

    local: LocalFacts
    operators: Operators
    gpu: Gpu | None
    driver: bool
    """Whether its host has NVIDIA's driver."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was seen and measured; the same on every rank."""

    ranks: Mapping[Place, RankFacts]
    launcher: str
    device: str
    clocks: Offsets
    folders: Mapping[Place, Sequence[FolderFacts]]
    """Of one rank per host."""
    gemm: Mapping[Place, float]
    """FLOP/s."""
    dtype: str
    """Type of the numbers in the matrix products."""
    collectives: Sequence[CollectiveTime]
    findings: Sequence[Finding]
    seconds: float

    @property
    def num_hosts(self) -> int:
        """Hosts that the ranks are on."""
        return len(one_per_host(self.ranks))


def examine_all_ranks(ranks: Ranks, facts: LocalFacts, request: Request, report: Report) -> Examination:
    """Join the other ranks and examine everything. All ranks call this and get the same result.

    Args:
        report: takes a few words about what is happening now.
    Raises:
        LaunchError: the other ranks did not join, or one of them was lost.
    """
    set_up_process(ranks.local_size, ranks.local_rank, request.bind_cores)
    device = choose_device(ranks.local_rank)
    report(f"waiting for {ranks.world_size} ranks")
    with (
        process_group(ranks, device, timeout=request.timeout) as world,
        lost_ranks_named(world, "--timeout-minutes", "look at that rank's host first"),
    ):
        return examine(world, facts, request, report)


def examine(world: World, facts: LocalFacts, request: Request, report: Report) -> Examination:
    """Examine everything. A collective call."""
    start = time.monotonic()
    report("comparing the ranks")
    own = _with_torch(facts, world)
    seen = {other.local.place: other for other in world.gather(own)}
    report("comparing clocks")
    clocks = measure_offsets(world)
    report("trying the disks")
    folders, unshared, unlocked = _look_at_disks(world, facts.place, seen, request)
    report("multiplying matrices")
    dtype = compute_dtype(resolve_precision("auto", world.device.type))
    gemm = dict(zip(seen, measure_gemm(world, dtype), strict=True))
    report("timing collectives")
    collectives = measure_collectives(world, SIZES[world.device.type])
    examination = Examination(
        ranks=seen,
        launcher=world.ranks.launcher,
        device=world.device.type,
        clocks=clocks,
        folders=folders,
        gemm=gemm,
        dtype=str(dtype).removeprefix("torch."),
        collectives=collectives,
        findings=(),
        seconds=0.0,
    )
    findings = check_all(examination, request.operators, unshared, unlocked)
    return dataclasses.replace(examination, findings=findings, seconds=time.monotonic() - start)


def _with_torch(facts: LocalFacts, world: World) -> RankFacts:
    """The rank's facts, with those that need torch."""
    versions = {**facts.versions.versions, **library_versions()}
    return RankFacts(
        local=dataclasses.replace(
            facts,
            versions=dataclasses.replace(facts.versions, versions=versions),
            machine=look_at_machine(num_threads()),  # again: it may have been bound to cores in the meantime
        ),
        operators=look_at_operators(),
        gpu=gpu_of(world.device),
        driver=has_driver(),
    )


def _look_at_disks(
    world: World, place: Place, seen: Mapping[Place, RankFacts], request: Request
) -> tuple[dict[Place, tuple[FolderFacts, ...]], dict[str, list[Place]], dict[str, list[Place]]]:
    """The folders as each host sees them, and by path of a run folder the places that do not see what rank 0 writes there,
    and those that do not see its locks."""
    leads = one_per_host(seen)
    own = tuple(try_folder(folder, request.test_bytes) for folder in request.folders) if place in leads else ()
    folders = {lead: answer for lead, answer in zip(seen, world.gather(own), strict=True) if lead in leads}
    unshared, unlocked = {}, {}
    for index, folder in enumerate(request.folders):
        if folder.role == "run":
            with marker(own[index]) if world.rank == 0 else contextlib.nullcontext("") as path:
                path = world.gather(path)[0]
                sees = world.gather(look_at_marker(path) if place in leads and path else "locked")
            unshared[folder.path] = [other for other, how in zip(seen, sees, strict=True) if how == "unseen"]
            unlocked[folder.path] = [other for other, how in zip(seen, sees, strict=True) if how == "unlocked"]
    unshared, unlocked = ({path: p for path, p in found.items() if p} for found in (unshared, unlocked))
    return folders, unshared, unlocked


def check_all(
    examination: Examination,
    operators: frozenset[str],
    unshared: Mapping[str, Sequence[Place]],
    unlocked: Mapping[str, Sequence[Place]],
) -> list[Finding]:
    """All findings, errors first.

    Args:
        operators: DeepSpeed's operators that the run needs.
        unshared: folder -> places that do not see what rank 0 wrote there.
        unlocked: folder -> places that do not see rank 0's locks there.
    """
    ranks = examination.ranks
    machines = {place: own.local.machine for place, own in ranks.items()}
    found = [
        *check_versions({place: own.local.versions for place, own in ranks.items()}),
        *check_gpus({p: own.gpu for p, own in ranks.items()}, {p: own.driver for p, own in ranks.items()}),
        *check_machines(machines, examination.device),
        *check_networks({place: own.local.network for place, own in ranks.items()}, machines, examination.device),
        *check_clocks(dict(zip(ranks, examination.clocks.seconds, strict=True))),
        *check_disks(examination.folders, unshared, unlocked),
        *check_gemm(examination.gemm),
        *check_collectives(examination.collectives, examination.num_hosts, examination.device),
        *check_operators({place: own.operators for place, own in ranks.items()}, operators),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")
