"""What launchers say about a process: complete, partial and damaged sets of their variables, nested launchers."""

import random

import pytest

from dsllm.engine.processes.launcher_variables import first_host
from dsllm.engine.processes.ranks import Ranks, discover_ranks
from dsllm.errors import LaunchError

STORE = {"MASTER_ADDR": "a", "MASTER_PORT": "7"}


def torchrun(rank: int, sizes: list[int]) -> dict[str, str]:
    node, local = place(rank, sizes)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(sum(sizes)),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(sizes[node]),
        "TORCHELASTIC_RUN_ID": "none",
        "GROUP_RANK": str(node),
    }


def deepspeed(rank: int, sizes: list[int]) -> dict[str, str]:
    node, local = place(rank, sizes)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(sum(sizes)),
        "LOCAL_RANK": str(local),
        "LOCAL_SIZE": str(sizes[node]),
        "CROSS_RANK": str(node),
        "CROSS_SIZE": str(len(sizes)),
    }


def by_hand(rank: int, sizes: list[int]) -> dict[str, str]:
    return {name: value for name, value in torchrun(rank, sizes).items() if not name.startswith(("TORCH", "GROUP"))}


def mpi_of(prefix: str):
    def variables(rank: int, sizes: list[int]) -> dict[str, str]:
        node, local = place(rank, sizes)
        return {
            f"{prefix}_RANK": str(rank),
            f"{prefix}_SIZE": str(sum(sizes)),
            f"{prefix}_LOCAL_RANK": str(local),
            f"{prefix}_LOCAL_SIZE": str(sizes[node]),
        }

    return variables


def hydra(rank: int, sizes: list[int]) -> dict[str, str]:
    """As mpiexec of MPICH 5.0 and of Intel MPI 2021.19 sets them."""
    node, local = place(rank, sizes)
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(sum(sizes)),
        "PMI_FD": "9",
        "MPI_LOCALRANKID": str(local),
        "MPI_LOCALNRANKS": str(sizes[node]),
    }


def srun(rank: int, sizes: list[int]) -> dict[str, str]:
    """As srun of SLURM 22.05 sets them, in a job of more tasks than the step has."""
    node, local = place(rank, sizes)
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_ID": "3",
        "SLURM_STEPID": "3",
        "SLURM_STEP_NUM_TASKS": str(sum(sizes)),
        "SLURM_NTASKS": str(sum(sizes)),
        "SLURM_STEP_TASKS_PER_NODE": slurm_list(sizes),
        "SLURM_TASKS_PER_NODE": "8(x9)",
        "SLURM_JOB_ID": "123",
        "SLURM_STEP_NODELIST": "n[1-4]",
        "SLURM_JOB_NODELIST": "n[1-9]",
        "SLURM_NTASKS_PER_NODE": "8",
    }


LAUNCHERS = {
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "environment": by_hand,
    "mpirun": mpi_of("OMPI_COMM_WORLD"),
    "mpirun of MVAPICH": mpi_of("MV2_COMM_WORLD"),
    "mpiexec": hydra,
    "srun": srun,
}
IDENTIFYING = {  # variables that only a process of a job of several has
    *("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    *(f"{mpi}_COMM_WORLD_{name}" for mpi in ("OMPI", "MV2") for name in ("RANK", "SIZE", "LOCAL_RANK")),
    *("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
}
HOSTS = ([2], [3], [2, 2], [2, 1], [4, 2], [1, 1, 1], [2, 2, 2, 1])


def place(rank: int, sizes: list[int]) -> tuple[int, int]:
    """Node and local rank."""
    for node, size in enumerate(sizes):
        if rank < size:
            return node, rank
        rank -= size
    raise AssertionError(f"no rank {rank} on {sizes}")


def slurm_list(sizes: list[int]) -> str:
    """2(x3),1"""
    parts: list[list[int]] = []
    for size in sizes:
        if parts and parts[-1][0] == size:
            parts[-1][1] += 1
        else:
            parts.append([size, 1])
    return ",".join(str(size) if times == 1 else f"{size}(x{times})" for size, times in parts)


@pytest.mark.parametrize("sizes", HOSTS, ids=str)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_of_every_launcher(launcher, sizes):
    for rank in range(sum(sizes)):
        node, local = place(rank, sizes)
        ranks = discover_ranks({**LAUNCHERS[launcher](rank, sizes), **STORE})
        assert ranks == Ranks(
            rank=rank,
            local_rank=local,
            world_size=sum(sizes),
            local_size=sizes[node],
            launcher=launcher,
            master_address="a",
            master_port=7,
        )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_of_one(launcher):
    ranks = discover_ranks(LAUNCHERS[launcher](0, [1]))
    assert (ranks.rank, ranks.world_size, ranks.local_size, ranks.master_address) == (0, 1, 1, "127.0.0.1")


ODD = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "64",
    "x",
    "1.0",
    "nan",
    "9" * 5000,
    "1_0",
    "٣",
    "2(x3),1",
    "2(x",
    "0x1",
    "\0",
]


def damaged(random_numbers: random.Random, sizes: list[int], launcher: str) -> tuple[list[dict[str, str]], bool]:
    """The environments of all processes of a job, damaged in the same way; and whether a value was changed."""
    processes = [LAUNCHERS[launcher](rank, sizes) for rank in range(sum(sizes))]
    names = sorted(processes[0])
    dropped = {name for name in names if random_numbers.random() < random_numbers.choice([0.1, 0.5, 0.9])}
    changes = {}
    if random_numbers.random() < 0.6:
        stale = LAUNCHERS[random_numbers.choice(sorted(LAUNCHERS))](0, random_numbers.choice([[1], [2], [8]]))
        candidates = [*names, *stale, "PMIX_RANK", "PALS_RANKID", "MASTER_PORT", "SLURM_NTASKS", "PMI_LOCAL_SIZE"]
        for name in random_numbers.sample(candidates, random_numbers.randint(1, 3)):
            changes[name] = random_numbers.choice([*ODD, stale.get(name, "1")])
        if random_numbers.random() < 0.3:
            changes |= stale
    kept = [{n: v for n, v in process.items() if n not in dropped} for process in processes]
    return [{**STORE, **process, **changes} for process in kept], bool(changes)


def check_damaged(seed: int, launcher: str) -> str:
    """Discover the ranks of all processes of a damaged job; what came of it."""
    random_numbers = random.Random(f"{launcher} {seed}")
    sizes = random_numbers.choice(HOSTS)
    environments, changed = damaged(random_numbers, sizes, launcher)
    found = []
    for rank, environment in enumerate(environments):
        try:
            ranks = discover_ranks(environment)
        except LaunchError as error:
            assert len(str(error)) < 1000, error
            continue
        assert 0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_size <= ranks.world_size
        assert 1 <= ranks.master_port <= 65535 and ranks.master_address
        whole = discover_ranks({**STORE, **LAUNCHERS[launcher](rank, sizes)})
        if ranks.world_size > 1 and not changed:  # less is known, but nothing is wrong
            numbers = [(r.rank, r.world_size, r.local_rank, r.local_size) for r in (ranks, whole)]
            assert numbers[0] == numbers[1], environment
        found.append(ranks)
    known = IDENTIFYING & {name for name, value in environments[-1].items() if value.strip()}
    if known and not changed:
        alone = [ranks for ranks in found if ranks.world_size == 1]
        assert len(alone) <= 1, f"{len(alone)} processes would train alone: {environments}"
    return "found" if found else "refused"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_damaged_variables_are_read_right_or_refused(launcher):
    """300 jobs each: variables lost, changed, and left over from other launchers."""
    outcomes = {check_damaged(seed, launcher) for seed in range(300)}
    assert outcomes == {"found", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_many_damaged_variables(launcher):
    """3,000 jobs each."""
    for seed in range(300, 3_300):
        check_damaged(seed, launcher)


SRUN = srun(3, [2, 2])
TWO = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", **STORE}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set, though RANK=1 is"),
        ({"RANK": "0"}, "WORLD_SIZE is not set, though RANK=0 is"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, though WORLD_SIZE=2 is"),
        ({"LOCAL_RANK": "1"}, "WORLD_SIZE is not set|RANK is not set"),
        ({"PMI_RANK": "1"}, "PMI_SIZE is not set, though PMI_RANK=1 is"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", **STORE}, "MPI_LOCALRANKID is not set"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0 says that a launcher with PMIx has started this process"),
        ({"JSM_NAMESPACE_RANK": "1"}, "jsrun"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun has started this process"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number from 0 on"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: a world has at least 1 process"),
        ({"RANK": "0", "WORLD_SIZE": "999999999"}, "at most 1,000,000"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "8 processes run on this host"),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **STORE}, "LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({**by_hand(1, [2]), "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        # variables that a shell has kept from an earlier job, in each process of an MPI or SLURM job
        ({"RANK": "0", "WORLD_SIZE": "1", **TWO}, "says RANK=0 and WORLD_SIZE=1, but also OMPI_COMM_WORLD_RANK=1"),
        ({**hydra(0, [1]), **TWO}, "says PMI_RANK=0 and PMI_SIZE=1, but also OMPI_COMM_WORLD_RANK=1"),
        ({**hydra(0, [1]), **SRUN, **STORE}, "says PMI_RANK=0 and PMI_SIZE=1, but also SLURM_PROCID=3"),
        ({**by_hand(0, [2, 2]), **SRUN, **STORE}, "Unset RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS and"),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMIX_RANK": "1"}, "PMIX_RANK=1"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID is not set, though SLURM_STEP_ID is"),
        ({**SRUN, **STORE, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, "is not the 4 tasks that srun has started"),
        ({**SRUN, **STORE, "SLURM_STEP_TASKS_PER_NODE": "two"}, "not a list of tasks as SLURM writes it"),
        ({**SRUN, **STORE, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "2"}, "SLURM_NODEID says that this node"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1, but SLURM_PROCID or SLURM_STEP_ID is not set"),
    ],
)  # fmt: skip
def test_what_is_missing_or_contradicts_itself_is_refused_by_name(environment, says):
    with pytest.raises(LaunchError, match=says):
        discover_ranks(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": ""},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
        # the shell of salloc, a batch script, and the step that an allocation's shell may run in
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_NODELIST": "n[1-2]"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_what_is_no_job_of_several_is_one_process(environment):
    ranks = discover_ranks(environment)
    assert (ranks.rank, ranks.world_size, ranks.launcher, ranks.master_address) == (0, 1, "python", "127.0.0.1")


def test_the_innermost_launcher_counts():
    """torchrun on each node of a SLURM step, MPI on the nodes of one, and scripts that pass SLURM's numbers on."""
    assert discover_ranks({**torchrun(9, [8, 8]), **srun(1, [1, 1]), **STORE}).rank == 9
    assert discover_ranks({**torchrun(0, [1]), **srun(1, [1, 1]), **STORE}).world_size == 1
    assert discover_ranks({**mpi_of("OMPI_COMM_WORLD")(5, [4, 4]), **srun(1, [1, 1]), **STORE}).rank == 5
    passed_on = {"RANK": "3", "WORLD_SIZE": "4", **SRUN, **STORE}
    ranks = discover_ranks(passed_on)
    assert (ranks.rank, ranks.local_rank, ranks.local_size, ranks.launcher) == (3, 1, 2, "environment")


def test_srun_that_speaks_pmi_is_srun():
    """srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, but no local numbers."""
    ranks = discover_ranks({"PMI_RANK": "3", "PMI_SIZE": "4", **SRUN, **STORE})
    assert (ranks.launcher, ranks.local_rank, ranks.local_size) == ("srun", 1, 2)


def test_a_step_has_its_own_tasks_not_those_of_its_job():
    ranks = discover_ranks({**srun(6, [4, 2, 1]), **STORE, "SLURM_NTASKS": "72"})
    assert (ranks.world_size, ranks.local_rank, ranks.local_size) == (7, 0, 1)


def test_the_first_node_of_a_step_is_the_master_where_none_is_named():
    ranks = [discover_ranks(srun(rank, [2, 2])) for rank in range(4)]
    assert {r.master_address for r in ranks} == {"n1"} and len({r.master_port for r in ranks}) == 1
    assert ranks[0].master_port != discover_ranks({**srun(0, [2, 2]), "SLURM_STEP_ID": "4"}).master_port
    assert discover_ranks(srun(1, [2])).master_address == "127.0.0.1"
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        discover_ranks({**srun(1, [2, 2]), "SLURM_DISTRIBUTION": "arbitrary"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"), ("n[1-4]", "n1"), ("gpu-a[007,009-012],n1", "gpu-a007"), ("n1,n[2-3]", "n1"), ("r1[01-02]-ib", "r101-ib"),
        ("a.b.c,d", "a.b.c"), ("", None), ("$(x)", None), ("n[1-2][3-4]", None),
    ],
)  # fmt: skip
def test_the_first_of_a_list_of_hosts(hosts, first):
    assert first_host(hosts) == first
