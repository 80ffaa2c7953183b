"""Reads what launchers say about a process in its environment: torchrun, deepspeed, the MPIs and srun."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dsllm.errors import LaunchError

MOST_RANKS = 1_000_000
"""More processes than any machine runs; a larger number is a mistake."""

_LONGEST_SHOWN = 60

_OF_A_STEP = (
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the variables of one launcher say about this process: a rank within a world."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    """None: the launcher does not say it, as with the local size."""
    local_size: int | None
    names: "Family"

    def __str__(self) -> str:
        return f"{self.names.rank}={self.rank} and {self.names.size}={self.size}"

    def agrees_with(self, other: "Claim") -> bool:
        """Whether both name the same rank of the same world."""
        return (self.rank, self.size) == (other.rank, other.size)


@dataclass(frozen=True)
class Family:
    """The variables in which a launcher writes the same four numbers. Of several local names the first that is set counts."""

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


BY_HAND = Family("environment", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
"""Also of torchrun and deepspeed, which other variables give away."""

SRUN = Family("srun", "SLURM_PROCID", "SLURM_NTASKS", ("SLURM_LOCALID",), ("SLURM_STEP_TASKS_PER_NODE",))

MPIS = (
    Family(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    # MVAPICH 2, and 3 and later; not run by us
    *(
        Family(
            "mpirun of MVAPICH",
            f"{prefix}_COMM_WORLD_RANK",
            f"{prefix}_COMM_WORLD_SIZE",
            (f"{prefix}_COMM_WORLD_LOCAL_RANK",),
            (f"{prefix}_COMM_WORLD_LOCAL_SIZE",),
        )
        for prefix in ("MV2", "MVP")
    ),
    # Hydra, which MPICH and Intel MPI share; the other local names are of Cray's PMI
    Family(
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
)

WITHOUT_A_SIZE = {
    "PMIX_RANK": "a launcher with PMIx",
    "PALS_RANKID": "Cray's PALS",
    "ALPS_APP_PE": "aprun",
    "JSM_NAMESPACE_RANK": "jsrun",
    "FLUX_TASK_RANK": "flux",
    "TORCHELASTIC_RUN_ID": "torchrun",
}
"""Variables of launchers that give no world size by themselves, or that we do not read."""


def text(env: Mapping[str, str], name: str) -> str | None:
    """A variable's value; None where it is not set, or empty, as an unset variable of a shell script is passed on."""
    return env.get(name, "").strip() or None


def number(env: Mapping[str, str], name: str) -> int | None:
    """A variable's value as a whole number; None where it is not set or empty.

    Raises:
        LaunchError: it is not a whole number from 0 on, or absurdly large.
    """
    value = text(env, name)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", value):
        raise LaunchError(
            f"{name}={_shown(value)!r} is not a number from 0 on; it comes from the launcher's environment, or was set by hand"
        )
    return int(value)


def _shown(value: str) -> str:
    return value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "..."


def claim_by_hand(env: Mapping[str, str]) -> Claim | None:
    """RANK and its like, of torchrun, deepspeed, or set by hand; None where they are not set."""
    claim = _claim(env, BY_HAND)
    if claim is None:
        return None
    launcher = "deepspeed" if text(env, "CROSS_SIZE") else claim.launcher
    launcher = "torchrun" if text(env, "TORCHELASTIC_RUN_ID") else launcher
    return _checked(claim, launcher)


def claims_of_mpi(env: Mapping[str, str]) -> list[Claim]:
    """What each MPI says whose variables are set."""
    claims = [claim for family in MPIS if (claim := _claim(env, family))]
    return [_checked(claim, claim.launcher) for claim in claims]


def claim_of_srun(env: Mapping[str, str]) -> Claim | None:
    """What srun says; None where this process is no task of it, as in a batch script or in the shell of an allocation."""
    rank, local_rank, step = number(env, "SLURM_PROCID"), number(env, "SLURM_LOCALID"), _step_variable(env)
    if step is None:
        _check_batch_script(env)
        return None
    # in a shell inside an allocation, SLURM_NTASKS is of the allocation, and the step has one task
    size = number(env, "SLURM_STEP_NUM_TASKS") or number(env, "SLURM_NTASKS") or number(env, "SLURM_NPROCS")
    for name, value in (("SLURM_PROCID", rank), ("SLURM_NTASKS", size)):
        if value is None:
            raise LaunchError(
                f"{name} is not set, though {step} is: srun sets both; start all tasks by one srun, or unset every "
                "SLURM_STEP variable for a run on one process"
            )
    assert rank is not None and size is not None, "checked above"
    claim = Claim(
        launcher="srun",
        rank=rank,
        size=size,
        local_rank=local_rank if size > 1 else 0,
        local_size=_tasks_of_this_node(env, size) if size > 1 else 1,
        names=SRUN,
    )
    return _checked(claim, "srun")


def _step_variable(env: Mapping[str, str]) -> str | None:
    """The name of a variable that only srun's tasks have; None where none is set."""
    return next((name for name in _OF_A_STEP if text(env, name)), None)


def _check_batch_script(env: Mapping[str, str]) -> None:
    """A batch script is process 0 of no step: with other numbers, variables of srun have been lost on the way here."""
    found = {name: number(env, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")}
    lost = next((name for name, value in found.items() if value), None)
    if lost is None and found["SLURM_LOCALID"] is not None and found["SLURM_PROCID"] is None:
        lost = "SLURM_LOCALID"
    if lost is not None:
        raise LaunchError(
            f"{lost}={found[lost]}, but SLURM_PROCID or SLURM_STEP_ID is not set, and srun sets them for each task: start "
            f"all tasks by one srun, or unset {lost}"
        )


def refuse_unknown_launchers(env: Mapping[str, str]) -> None:
    """For a process to which no launcher has given a rank and a world size: it would train alone, as would each of its kind.

    Raises:
        LaunchError: a launcher has started it that we cannot read.
    """
    for name, launcher in WITHOUT_A_SIZE.items():
        if value := text(env, name):
            raise LaunchError(
                f"{name}={_shown(value)} says that {launcher} has started this process, but not how many there "
                "are: set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process, "
                f"or unset {name} for a run on one process"
            )


def _claim(env: Mapping[str, str], family: Family) -> Claim | None:
    """The four numbers of a family; None where none of them is set, or all say that there is one process."""
    rank, size = number(env, family.rank), number(env, family.size)
    local = {name: number(env, name) for name in (*family.local_rank, *family.local_size)}
    if rank is None or size is None:
        present = {family.rank: rank, family.size: size, **local}
        sizes = (family.size, *family.local_size)
        # a size of 1 by itself contradicts nothing: it means this process
        found = [name for name, value in present.items() if value is not None and not (name in sizes and value == 1)]
        if not found:
            return None
        missing = family.rank if rank is None else family.size
        raise LaunchError(
            f"{missing} is not set, though {found[0]}={present[found[0]]} is: a launcher sets both for each process. "
            f"Start all processes by one launcher, set {missing}, or unset {found[0]} for a run on one process"
        )
    return Claim(
        launcher=family.launcher,
        rank=rank,
        size=size,
        local_rank=next((local[name] for name in family.local_rank if local[name] is not None), None),
        local_size=next((local[name] for name in family.local_size if local[name] is not None), None),
        names=family,
    )


def _checked(claim: Claim, launcher: str) -> Claim:
    rank, size, local_rank, local_size = claim.rank, claim.size, claim.local_rank, claim.local_size
    if not 1 <= size <= MOST_RANKS:
        raise LaunchError(f"{claim.names.size}={size}: a world has at least 1 process and at most {MOST_RANKS:,}")
    if rank >= size:
        raise LaunchError(f"rank {rank} is not within a world of {size}; {launcher} set both ({claim})")
    if local_size is not None and not 1 <= local_size <= size:
        raise LaunchError(
            f"{claim.names.local_size[0]} says that {local_size} processes run on this host, but the world has {size} "
            f"({claim}); {launcher} set both"
        )
    if local_rank is not None and local_rank >= (size if local_size is None else local_size):
        raise LaunchError(
            f"local rank {local_rank} is not within the {size if local_size is None else local_size} processes of this "
            f"host; {launcher} set both"
        )
    return replace(claim, launcher=launcher)


def _tasks_of_this_node(env: Mapping[str, str], size: int) -> int | None:
    """How many of the step's tasks run on this node: SLURM writes 2(x3),1 for three nodes with two and one with one."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        value = text(env, name)
        if value is None:
            continue
        nodes = list(_repeated(name, value))
        if sum(count * times for count, times in nodes) == size:
            return _of_node(nodes, number(env, "SLURM_NODEID"), f"{name}={_shown(value)}")
        if name == "SLURM_STEP_TASKS_PER_NODE":
            raise LaunchError(f"{name}={_shown(value)} is not the {size} tasks that srun has started")
    per_node, num_nodes = number(env, "SLURM_NTASKS_PER_NODE"), number(env, "SLURM_STEP_NUM_NODES")
    num_nodes = num_nodes or number(env, "SLURM_NNODES")
    if num_nodes == 1:
        return size
    return per_node if per_node and num_nodes and per_node * num_nodes == size else None


def _repeated(name: str, value: str) -> Iterator[tuple[int, int]]:
    for part in value.split(","):
        found = re.fullmatch(r"([0-9]{1,7})(?:\(x([0-9]{1,7})\))?", part.strip())
        if found is None:
            raise LaunchError(f"{name}={_shown(value)} is not a list of tasks as SLURM writes it, like 2(x3),1")
        yield int(found[1]), int(found[2] or 1)


def _of_node(nodes: list[tuple[int, int]], node: int | None, where: str) -> int | None:
    """The number of tasks on a node; None where the nodes differ and it is not known which one this is."""
    if len({count for count, _ in nodes}) == 1:
        return nodes[0][0]
    if node is None:
        return None
    for count, times in nodes:
        if node < times:
            return count
        node -= times
    raise LaunchError(f"SLURM_NODEID says that this node is not among those of {where}")


def first_host(hosts: str) -> str | None:
    """The first host of a list as SLURM writes it: node[01-03,7],gpu1 begins with node01. None: not such a list."""
    found = re.match(r"([A-Za-z0-9._-]*)(?:\[([0-9]+)[^\[\]]*\])?([A-Za-z0-9._-]*)(?=,|$)", hosts.strip())
    return "".join(part or "" for part in found.groups()) or None if found else None
