"""The cluster that runs a job: hosts, SLURM, MPI, environment and time-outs, as one typed, frozen value."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dsllm.config.fields import FORBID_UNKNOWN_KEYS

Launcher = Literal["local", "deepspeed", "torchrun", "slurm", "mpi"]


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """One host, and how many ranks run on it."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    """Name or IP address, as ssh and the other hosts know it; USER@NAME where ssh needs another user."""
    slots: int
    """Ranks on this host: one per GPU."""

    @property
    def address(self) -> str:
        """The name without the user: where the other ranks find this host."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True, kw_only=True)
class SshConfig:
    """How to reach the hosts. Keys and jump hosts belong in ssh's own config."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    port: int | None = None
    """Port of the hosts' sshd. None (default): the port in ssh's own config."""
    options: tuple[str, ...] = ()
    """Further arguments of ssh, for example [-i, /home/me/.ssh/cluster]."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """The resources that a SLURM job requests."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    partition: str | None = None
    """Queue. None (default): the cluster's default."""
    account: str | None = None
    """The account whose allocation pays."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = 1
    """Number of hosts."""
    tasks_per_node: int = 1
    """Ranks on each host: one per GPU."""
    gpus_per_node: int | None = None
    """GPUs of each host, as --gpus-per-node; set gres instead if the cluster counts GPUs only there."""
    gres: str | None = None
    """Generic resources of each host, for example gpu:8 or gpu:h100:4."""
    cpus_per_task: int | None = None
    """Cores of each rank."""
    memory: str | int | None = None
    """Memory of each host, for example 900G. 0: all of it."""
    time_limit: str | int | None = None
    """Longest time of one start: minutes, hours:minutes:seconds, or days-hours:minutes:seconds."""
    requeue: bool = True
    """Start again after the job has saved at its time limit, and after a host has failed."""
    signal_seconds: int = 300
    """How long before the time limit the ranks get the signal to save and exit; SLURM may be a minute late."""
    start: Literal["srun", "ssh"] = "srun"
    """srun: one task per rank, no ssh between the hosts; ssh: DeepSpeed's launcher on each host, over ssh."""
    options: tuple[str, ...] = ()
    """Further options at the head of the batch script, for example [--exclusive, --constraint=ib]."""


@dataclass(frozen=True, kw_only=True)
class MpiConfig:
    """How to call Open MPI."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    program: str = "mpirun"
    """Name or path of Open MPI's mpirun."""
    options: tuple[str, ...] = ()
    """Further arguments of mpirun, for example [--bind-to, none]."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """The container image in which ranks run. Written from the documentation of these tools; we have not run it."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    image: str
    """A file; for pyxis also an image in a registry."""
    runtime: Literal["pyxis", "apptainer"]
    """pyxis: SLURM's plug-in for enroot; apptainer: under every launcher."""
    mounts: tuple[str, ...] = ()
    """Folders to mount, as HOST_PATH or HOST_PATH:PATH_IN_CONTAINER."""
    options: tuple[str, ...] = ()
    """Further arguments of srun (pyxis) or of apptainer exec."""


@dataclass(frozen=True, kw_only=True)
class TimeoutConfig:
    """How long `dsllm launch` waits before it kills the processes that still run."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    save_seconds: float = 600.0
    """From a request to stop to the end of the ranks; must be longer than the slowest save."""
    end_seconds: float = 90.0
    """From the end of the first host, or of the run, to the end of all others."""
    connect_seconds: int = 15
    """For ssh to reach a host. A host that stays silent for three times as long counts as lost."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines that a run uses. In paths, ${NAME} and ~ are replaced by their values on the machine that calls
    `dsllm launch`."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    launcher: Launcher | None = None
    """The program that starts the ranks. None (default): slurm if there is a section slurm, deepspeed if there are hosts,
    otherwise local."""
    hosts: tuple[HostConfig, ...] = ()
    """The hosts; rank 0 is on the first one."""
    hostfile: str | None = None
    """In place of hosts: a DeepSpeed hostfile, with a line `NAME slots=N` for each host."""
    slots: int | None = None
    """Ranks of a local run. None (default): one per GPU of this machine, or one if it has no GPU."""
    shared_directory: str | None = None
    """Folder that all hosts see under the same path. Ranks start in it, and relative paths of the run, including its
    directory, count from it. None (default): the working directory of the command."""
    master_address: str | None = None
    """Address at which the other ranks reach the first host. None (default): its name."""
    port: int | None = None
    """Port of rank 0's store. None (default): a number made from the job's name; for local runs a free port."""
    interface: str | None = None
    """Network interface that gloo, NCCL and MPI use, for example ib0. None (default): they choose one."""
    modules: tuple[str, ...] = ()
    """Environment modules to load on each host with `module load`."""
    virtual_environment: str | None = None
    """Folder of the virtual environment on each host. None (default): with modules or a container, their `python`;
    otherwise the Python that runs this command."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the ranks; their values are passed on literally."""
    container: ContainerConfig | None = None
    ssh: SshConfig = field(default_factory=SshConfig)
    slurm: SlurmConfig | None = None
    mpi: MpiConfig = field(default_factory=MpiConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)

    @property
    def chosen_launcher(self) -> Launcher:
        """The launcher that is set, else the one that the sections imply."""
        if self.launcher:
            return self.launcher
        return "slurm" if self.slurm else "deepspeed" if self.hosts else "local"

    @property
    def num_ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.hosts)
