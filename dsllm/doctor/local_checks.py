"""Checks one rank can make without torch or other ranks, so they still report when torch cannot be imported."""

import socket
from dataclasses import dataclass
from datetime import timedelta

from dsllm.doctor.disks import TEST_BYTES, Folder
from dsllm.doctor.findings import Finding, Place, where
from dsllm.doctor.machine import Machine, check_machines, look_at_machine
from dsllm.doctor.network import Network, check_networks, look_at_network
from dsllm.doctor.versions import Versions, check_versions, look_at_versions
from dsllm.engine.processes.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to check in addition to the machines themselves."""

    folders: tuple[Folder, ...]
    operators: frozenset[str] = frozenset()
    """DeepSpeed's compiled operators that the run needs."""
    timeout: timedelta = timedelta(minutes=2)
    """Longest wait for another rank."""
    bind_cores: bool | None = None
    """train.bind_cores of the run."""
    test_bytes: int = TEST_BYTES
    """Size of the test file on each disk."""


@dataclass(frozen=True, kw_only=True)
class LocalFacts:
    """What one rank sees by itself."""

    place: Place
    versions: Versions
    machine: Machine
    network: Network


def collect_local_facts(ranks: Ranks) -> LocalFacts:
    """This rank, the versions of what is installed, its host's limits and network."""
    return LocalFacts(
        place=Place(rank=ranks.rank, local_rank=ranks.local_rank, host=socket.gethostname()),
        versions=look_at_versions(),
        machine=look_at_machine(),
        network=look_at_network(),
    )


def check_locally(facts: LocalFacts) -> list[Finding]:
    """The findings that need no other rank."""
    place = facts.place
    return [
        *check_versions({place: facts.versions}),
        *check_machines({place: facts.machine}, device="cpu"),
        *check_networks({place: facts.network}, {place: facts.machine}, device="cpu"),
    ]


def cannot_import(place: Place, error: Exception) -> Finding:
    """torch or DeepSpeed is installed, but cannot be imported."""
    return Finding(
        level="error",
        check="imports",
        where=where([place]),
        problem=f"torch or DeepSpeed cannot be imported: {type(error).__name__}: {error}",
        action="reinstall both in this environment, torch first, in versions that fit each other and the driver",
    )


def cannot_join(place: Place, reason: str, error: Exception) -> Finding:
    """This rank cannot reach the others."""
    return Finding(
        level="error",
        check="joining",
        where=where([place]),
        problem=f"{error}{f' ({reason})' if reason else ''}",
        action="start all ranks together, with one master address and port that every host can reach",
    )
