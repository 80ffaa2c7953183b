"""A job: one start of a run on a cluster, its files, and the shell lines that every host needs first."""

import shlex
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsllm.config.cluster import ClusterConfig

JOB_VARIABLE = "DSLLM_JOB"
"""Every process of a job has this variable, so that stopping one job never hits another one's processes. The host's number
is part of its value: two of a job's hosts may be one machine."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is started, and where."""

    name: str
    """Unique: the run's name, the time and the process."""
    run_name: str
    words: tuple[str, ...]
    """What `dsllm train` is called with: the run's YAML file and the overrides."""
    directory: Path
    """Folder that all hosts see; the ranks start in it."""
    run_directory: Path

    @property
    def folder(self) -> Path:
        """Where the job's files lie."""
        return self.run_directory / "launch" / self.name


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that a start writes and runs, before anything is written or run."""

    files: dict[Path, str]
    commands: dict[str, tuple[str, ...]]
    """By host, in the order of the hosts: what runs on this machine to start the host's part of the job."""
    sweeps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By host: what ends a failed job's processes on hosts where no watch of ours runs."""


def quoted(words: Sequence[str]) -> str:
    """Words as one line of shell that yields them again, whatever is in them."""
    return shlex.join(words)


def python_of(cluster: ClusterConfig) -> str:
    """The Python on the hosts: of the virtual environment, of the modules or the container, or this one."""
    if cluster.virtual_environment or cluster.modules or cluster.container:
        return "python"
    return sys.executable


def in_container(cluster: ClusterConfig) -> list[str]:
    """Words before a command that run it inside apptainer; none for other runtimes (pyxis is part of srun)."""
    box = cluster.container
    if box is None or box.runtime != "apptainer":
        return []
    mounts = [word for mount in box.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, *box.options, box.image]


def preparation(cluster: ClusterConfig) -> list[str]:
    """Shell lines that every host runs first: modules, virtual environment, variables."""
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
    """A script of the job: the preparation, then one command in its place; `$1` is the host's number, from 0."""
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


def derived_port(job: Job, cluster: ClusterConfig) -> int:
    """The port of rank 0's store: as given, or from the job's name, which keeps two jobs of a host apart."""
    return cluster.port or 20000 + zlib.crc32(job.name.encode()) % 10000
