"""The cluster on which a run is carried out: hosts, SLURM, MPI, environment and time-outs, as one typed, frozen value."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dsllm.config.fields import FORBID_UNKNOWN_KEYS

Launcher = Literal["local", "deepspeed", "torchrun", "slurm", "mpi"]


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """One host and how many ranks it takes."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    """Name or IPv4 address, as ssh and the other hosts know it."""
    slots: int
    """Ranks on this host: one per GPU."""


@dataclass(frozen=True, kw_only=True)
class SshConfig:
    """How the hosts are reached; keys, users and jump hosts belong into ssh's own config."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    port: int | None = None
    """Port of the hosts' sshd; nothing: what ssh's own config says."""
    options: tuple[str, ...] = ()
    """More words for ssh's command line, for example [-i, /home/me/.ssh/cluster]."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What is asked of SLURM."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    partition: str | None = None
    """Queue; nothing: the cluster's default."""
    account: str | None = None
    """Whose allocation pays."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = 1
    """Hosts of the job."""
    tasks_per_node: int = 1
    """Ranks on each host: one per GPU."""
    gpus_per_node: int | None = None
    """GPUs of each host, as --gpus-per-node; where the cluster counts them as gres only, give gres."""
    gres: str | None = None
    """Generic resources of each host, for example gpu:8 or gpu:h100:4."""
    cpus_per_task: int | None = None
    """Cores of each rank."""
    memory: str | int | None = None
    """Memory of each host, for example 900G; 0: all of it."""
    time_limit: str | int | None = None
    """As SLURM writes it: minutes, hours:minutes:seconds, or days-hours:minutes:seconds."""
    requeue: bool = True
    """Start again after a save at the time limit, and after a host's failure."""
    signal_seconds: int = 300
    """How long before the time limit the ranks are told to save and leave; SLURM may be a minute late."""
    start: Literal["srun", "ssh"] = "srun"
    """srun: one task per rank, no ssh between the hosts; ssh: DeepSpeed's launcher on each host, over ssh."""
    options: tuple[str, ...] = ()
    """More options for the head of the batch script, for example [--exclusive, --constraint=ib]."""


@dataclass(frozen=True, kw_only=True)
class MpiConfig:
    """How Open MPI is called."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    program: str = "mpirun"
    """Open MPI's mpirun: a name or a path."""
    options: tuple[str, ...] = ()
    """More words for its command line, for example [--bind-to, none]."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """The image in which ranks run. Written by the documentation of these tools; not tried by us."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    image: str
    """What the runtime calls an image: a file, or for pyxis also a registry's name."""
    runtime: Literal["pyxis", "apptainer"]
    """pyxis: SLURM's plug-in for enroot; apptainer: under every launcher."""
    mounts: tuple[str, ...] = ()
    """Folders seen inside, as HOST_PATH or HOST_PATH:PATH_INSIDE."""
    options: tuple[str, ...] = ()
    """More words for srun (pyxis) or for apptainer exec."""


@dataclass(frozen=True, kw_only=True)
class TimeoutConfig:
    """How long `dsllm launch` waits; what still runs after that is killed."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    save_seconds: float = 600.0
    """From the wish to stop to the end of the ranks: longer than the slowest save."""
    end_seconds: float = 90.0
    """From the end of the first host, or of the run, to the end of all others."""
    connect_seconds: int = 15
    """For ssh to reach a host; one that stays silent for three times as long counts as lost."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where a run is carried out, whatever it computes. In paths, ${NAME} and ~ stand for what they are where dsllm
    launch runs."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    launcher: Launcher | None = None
    """Who starts the ranks; nothing: slurm if there is a section slurm, deepspeed if there are hosts, otherwise local."""
    hosts: tuple[HostConfig, ...] = ()
    """The hosts; rank 0 is on the first one."""
    hostfile: str | None = None
    """In place of hosts: a file of DeepSpeed's kind, with a line `NAME slots=N` for each host."""
    slots: int | None = None
    """Ranks of a local run; nothing: one per GPU of this machine, or one."""
    shared_directory: str | None = None
    """Folder that all hosts see under the same path: ranks start in it, and relative paths of the run, its own directory
    too, count from it. Nothing: the working directory of the command."""
    master_address: str | None = None
    """Address of the first host for the other ranks; nothing: its name."""
    port: int | None = None
    """Port of rank 0's store; nothing: a number made from the job's name, a free one for local runs."""
    interface: str | None = None
    """Network interface of the ranks' traffic, for example ib0: gloo, NCCL and MPI are told."""
    modules: tuple[str, ...] = ()
    """Loaded with `module load` on each host."""
    virtual_environment: str | None = None
    """Folder of the virtual environment on each host; nothing: with modules or a container, the `python` found there,
    otherwise the Python that runs this command."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Variables for the ranks, as they are: nothing in them is expanded."""
    container: ContainerConfig | None = None
    ssh: SshConfig = field(default_factory=SshConfig)
    slurm: SlurmConfig | None = None
    mpi: MpiConfig = field(default_factory=MpiConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)

    @property
    def chosen_launcher(self) -> Launcher:
        """The launcher as asked for, or as the sections tell."""
        if self.launcher:
            return self.launcher
        return "slurm" if self.slurm else "deepspeed" if self.hosts else "local"

    @property
    def num_ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.hosts)
