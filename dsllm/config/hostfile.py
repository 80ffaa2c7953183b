"""Reads and writes DeepSpeed's hostfile: a line `NAME slots=N` for each host."""

import re
from collections.abc import Sequence
from pathlib import Path

from dsllm.config.check_cluster import HOST_NAME
from dsllm.config.cluster import HostConfig
from dsllm.errors import ConfigError


def read_hostfile(path: Path) -> tuple[HostConfig, ...]:
    """The hosts of a hostfile, in its order.

    Raises:
        ConfigError: the file is missing, unreadable or empty, or a line is not a host with its slots; lists every problem.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(
            f"hostfile {path}: no such file; without it the job would run on this machine alone"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile {path}: cannot be read: {error}") from error
    hosts: dict[str, HostConfig] = {}
    first_seen: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host, problem = _read_line(text)
        if host and host.name in first_seen:
            problem = (
                f"'{host.name}' is already on line {first_seen[host.name]}; name each host once, with all its slots"
            )
        if problem or host is None:
            problems.append(f"{path}:{number}: {problem}")
            continue
        hosts[host.name], first_seen[host.name] = host, number
    if not hosts and not problems:
        problems.append(f"{path}: names no host; write a line like `node1 slots=8` for each host")
    if problems:
        raise ConfigError(problems)
    return tuple(hosts.values())


def _read_line(text: str) -> tuple[HostConfig | None, str]:
    """The host on a line, or the problem with it."""
    name, *options = text.split()
    if not re.fullmatch(HOST_NAME, name):
        return None, f"{name!r} is not a host name: use letters, digits, '.', '-' and '_' only"
    slots = re.fullmatch(r"slots=(\d{1,6})", options[0], re.ASCII) if len(options) == 1 else None
    if slots is None:
        return None, f"after '{name}' write slots=N and nothing else, but there is {' '.join(options)!r}"
    if int(slots[1]) < 1:
        return None, "slots must be at least 1; remove a host that runs no rank"
    return HostConfig(name=name, slots=int(slots[1])), ""


def hostfile_text(hosts: Sequence[HostConfig]) -> str:
    """The content of a hostfile with these hosts, for DeepSpeed and Open MPI."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
