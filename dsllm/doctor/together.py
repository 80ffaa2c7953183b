"""All ranks together: compare what each one sees, then measure clocks, disks, matrix products and collectives."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsllm.config.precision import resolve_precision
from dsllm.doctor.alone import Alone, Request
from dsllm.doctor.clocks import Offsets, judge_clocks, measure_offsets
from dsllm.doctor.disks import FolderSeen, judge_disks, marker, try_folder
from dsllm.doctor.findings import Finding, Place, one_per_host
from dsllm.doctor.gpus import driver_is_there, judge_gpus
from dsllm.doctor.machine import judge_machines, look_at_machine
from dsllm.doctor.network import judge_networks
from dsllm.doctor.operators import judge_operators
from dsllm.doctor.speed import judge_collectives, judge_gemm, measure_gemm
from dsllm.doctor.versions import judge_versions
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

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank sees, its device included."""

    alone: Alone
    operators: Operators
    gpu: Gpu | None
    driver: bool
    """Whether its host has NVIDIA's driver."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All that was seen and measured, the same on every rank."""

    ranks: Mapping[Place, Seen]
    launcher: str
    device: str
    clocks: Offsets
    folders: Mapping[Place, Sequence[FolderSeen]]
    """Of one rank of each host."""
    gemm: Mapping[Place, float]
    """FLOP/s."""
    dtype: str
    """In which the matrix products were."""
    collectives: Sequence[CollectiveTime]
    findings: Sequence[Finding]
    seconds: float

    @property
    def num_hosts(self) -> int:
        """Hosts that the ranks are on."""
        return len(one_per_host(self.ranks))


def examine_together(ranks: Ranks, alone: Alone, request: Request, tell: Tell) -> Examination:
    """Join the other ranks and look at everything; all ranks call this, and all get the same.

    Args:
        tell: is told what is being done.
    Raises:
        LaunchError: the others did not come, or one of them was lost.
    """
    set_up_process(ranks.local_size, ranks.local_rank, request.bind_cores)
    device = choose_device(ranks.local_rank)
    tell(f"waiting for {ranks.world_size} ranks")
    with (
        process_group(ranks, device, timeout=request.timeout) as world,
        lost_ranks_named(world, "--timeout-minutes", "look at that rank's host first"),
    ):
        return examine(world, alone, request, tell)


def examine(world: World, alone: Alone, request: Request, tell: Tell) -> Examination:
    """Look at everything; a collective call."""
    start = time.monotonic()
    tell("comparing the ranks")
    own = _with_torch(alone, world)
    seen = {other.alone.place: other for other in world.gather(own)}
    tell("comparing clocks")
    clocks = measure_offsets(world)
    tell("trying the disks")
    folders, blind = _look_at_disks(world, alone.place, seen, request)
    tell("multiplying matrices")
    dtype = compute_dtype(resolve_precision("auto", world.device.type))
    gemm = dict(zip(seen, measure_gemm(world, dtype), strict=True))
    tell("timing collectives")
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
    findings = judge(examination, request.operators, blind)
    return dataclasses.replace(examination, findings=findings, seconds=time.monotonic() - start)


def _with_torch(alone: Alone, world: World) -> Seen:
    """What the rank knows of itself once torch is there."""
    versions = {**alone.versions.versions, **library_versions()}
    return Seen(
        alone=dataclasses.replace(
            alone,
            versions=dataclasses.replace(alone.versions, versions=versions),
            machine=look_at_machine(num_threads()),  # again: it may have been bound to its cores since
        ),
        operators=look_at_operators(),
        gpu=gpu_of(world.device),
        driver=driver_is_there(),
    )


def _look_at_disks(
    world: World, place: Place, seen: Mapping[Place, Seen], request: Request
) -> tuple[dict[Place, tuple[FolderSeen, ...]], dict[str, list[Place]]]:
    """The folders as each host sees them, and those hosts that do not see what rank 0 writes into the run's."""
    leads = one_per_host(seen)
    own = tuple(try_folder(folder, request.test_bytes) for folder in request.folders) if place in leads else ()
    folders = {lead: answer for lead, answer in zip(seen, world.gather(own), strict=True) if lead in leads}
    blind = {}
    for index, folder in enumerate(request.folders):
        if len(leads) > 1 and folder.role == "run":
            with marker(own[index]) if world.rank == 0 else contextlib.nullcontext("") as path:
                path = world.gather(path)[0]
                sees = world.gather(place not in leads or not path or Path(path).exists())
            blind[folder.path] = [other for other, good in zip(seen, sees, strict=True) if not good]
    return folders, {path: places for path, places in blind.items() if places}


def judge(seen: Examination, operators: frozenset[str], blind: Mapping[str, Sequence[Place]]) -> list[Finding]:
    """Everything that is not as it should be; errors first.

    Args:
        operators: DeepSpeed's operators that the run needs.
        blind: folder -> places that do not see what rank 0 wrote there.
    """
    ranks = seen.ranks
    machines = {place: own.alone.machine for place, own in ranks.items()}
    found = [
        *judge_versions({place: own.alone.versions for place, own in ranks.items()}),
        *judge_gpus({p: own.gpu for p, own in ranks.items()}, {p: own.driver for p, own in ranks.items()}),
        *judge_machines(machines, seen.device),
        *judge_networks({place: own.alone.network for place, own in ranks.items()}, machines, seen.device),
        *judge_clocks(dict(zip(ranks, seen.clocks.seconds, strict=True))),
        *judge_disks(seen.folders, blind),
        *judge_gemm(seen.gemm),
        *judge_collectives(seen.collectives, seen.num_hosts, seen.device),
        *judge_operators({place: own.operators for place, own in ranks.items()}, operators),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")
