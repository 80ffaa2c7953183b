"""A job is one start of a run on a cluster: its words, files and commands, and the shell lines that each host needs first."""

import shlex
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsllm.config.cluster import ClusterConfig

JOB_VARIABLE = "DSLLM_JOB"
"""Every process of a job inherits this variable, so that stopping one job never hits another. Its value ends with the host's
number, because two hosts of a job may be the same machine."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is started, and where."""

    name: str
    """Unique: the run's name, the time and the process."""
    run_name: str
    words: tuple[str, ...]
    """The arguments of `dsllm train`: the run's YAML file and the overrides."""
    directory: Path
    """Folder that all hosts see; the ranks start in it."""
    run_directory: Path

    @property
    def folder(self) -> Path:
        """Folder of the job's files."""
        return self.run_directory / "launch" / self.name


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The files and commands that start a job; nothing is written or run yet."""

    files: dict[Path, str]
    commands: dict[str, tuple[str, ...]]
    """By host, in the order of the hosts: the command on this machine that starts the host's part of the job."""
    sweeps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Clean-up command per host, for hosts without a watcher."""


def quoted(words: Sequence[str]) -> str:
    """One line of shell that yields exactly these words, whatever they contain."""
    return shlex.join(words)


def python_of(cluster: ClusterConfig) -> str:
    """The Python on the hosts: of the virtual environment, of the modules or the container, else this one."""
    if cluster.virtual_environment or cluster.modules or cluster.container:
        return "python"
    return sys.executable


def in_container(cluster: ClusterConfig) -> list[str]:
    """The words in front of a command that run it inside apptainer; none for other runtimes (srun itself knows pyxis)."""
    container = cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    mounts = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, *container.options, container.image]


def preparation(cluster: ClusterConfig) -> list[str]:
    """The shell lines that every host runs first: modules, virtual environment, variables."""
    lines = []
    if cluster.modules:
        lines += ["type module > /dev/null 2>&1 || . /etc/profile", f"module load {quoted(cluster.modules)}"]
    if cluster.virtual_environment:
        lines.append(f". {shlex.quote(cluster.virtual_environment + '/bin/activate')}")
    if cluster.interface:
        lines.append(f"export GLOO_SOCKET_IFNAME={cluster.interface} NCCL_SOCKET_IFNAME={cluster.interface}")
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in cluster.environment.items()]
    return lines


def script(about: str, job: Job, cluster: ClusterConfig, command: str) -> str:
    """A script of the job: prepares the host, then becomes the command; `$1` is the host's number, counted from 0."""
    lines = [
        "#!/bin/bash",
        f"# Written by dsllm launch. {about}",
        "set -e",
        f"cd -- {shlex.quote(str(job.directory))}",
        *preparation(cluster),
        f'export {JOB_VARIABLE}={job.name}."$1"',
        f"exec {command}",
    ]
    return "\n".join(lines) + "\n"


def port_of(job: Job, cluster: ClusterConfig) -> int:
    """The port of rank 0's store: the cluster's, else one made from the job's name, so that two jobs on a host differ."""
    return cluster.port or 20000 + zlib.crc32(job.name.encode()) % 10000
