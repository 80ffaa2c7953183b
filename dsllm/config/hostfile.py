"""Reads and writes DeepSpeed's hostfile: a line `NAME slots=N` for each host."""

import re
from collections.abc import Sequence
from pathlib import Path

from dsllm.config.check_cluster import problem_of_host
from dsllm.config.cluster import HostConfig
from dsllm.errors import ConfigError
from dsllm.untrusted_files import UntrustedFileError, read_bounded

_MOST_BYTES = 2**22
"""Some hundred thousand hosts."""

_MOST_PROBLEMS = 20


def read_hostfile(path: Path) -> tuple[HostConfig, ...]:
    """The hosts of a hostfile, in its order. Lines may also be as Open MPI has them: `NAME slots=N max_slots=M`.

    Raises:
        ConfigError: the file is missing, unreadable or empty, or a line is not a host with its slots; lists every problem.
    """
    lines = _lines(path)
    hosts: dict[str, HostConfig] = {}
    first_seen: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host, problem = _read_line(text)
        key = host.address.lower() if host else ""  # as host names are compared
        if key in first_seen:
            problem = (
                f"'{text.split()[0]}' is already on line {first_seen[key]}; name each host once, with all its slots"
            )
        if problem or host is None:
            problems.append(f"{path}:{number}: {problem}")
            continue
        hosts[key], first_seen[key] = host, number
    if not hosts and not problems:
        problems.append(f"{path}: names no host; write a line like `node1 slots=8` for each host")
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more lines"] if len(problems) > _MOST_PROBLEMS else []
        raise ConfigError([*problems[:_MOST_PROBLEMS], *more])
    return tuple(hosts.values())


def _lines(path: Path) -> list[str]:
    try:
        return read_bounded(path, _MOST_BYTES).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(
            f"hostfile {path}: no such file; without it the job would run on this machine alone"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"hostfile {path}: is not UTF-8 text (byte {error.start})") from error
    except UntrustedFileError as error:
        raise ConfigError(f"hostfile {path}: {error}") from error
    except (OSError, ValueError) as error:  # a ValueError: a path with a NUL in it
        raise ConfigError(f"hostfile {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_line(text: str) -> tuple[HostConfig | None, str]:
    """The host on a line, or the problem with it."""
    name, *options = text.split()
    if name.startswith("[") and name.endswith("]"):  # an IPv6 address as in a URL; ssh takes it without the brackets
        name = name[1:-1]
    if problem := problem_of_host(name):
        return None, problem
    first, *more = options or [""]
    slots = re.fullmatch(r"slots=(\d{1,6})", first, re.ASCII)
    most = re.fullmatch(r"max[_-]slots=(\d{1,6})", more[0], re.ASCII) if len(more) == 1 else None
    if slots is None or (more and most is None):
        return None, (
            f"after '{name}' write slots=N, the number of ranks on this host, and nothing else, but there is "
            f"{_shown(' '.join(options))!r}"
        )
    if int(slots[1]) < 1:
        return None, "slots must be at least 1; remove a host that runs no rank"
    if most is not None and int(most[1]) < int(slots[1]):
        return None, f"max_slots={most[1]} is below slots={slots[1]}"
    return HostConfig(name=name, slots=int(slots[1])), ""


def _shown(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


def hostfile_text(hosts: Sequence[HostConfig]) -> str:
    """The content of a hostfile with these hosts, for DeepSpeed and Open MPI."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
