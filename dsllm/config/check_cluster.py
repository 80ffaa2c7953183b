"""Checks the fields of a cluster against each other, and every text that a shell or a scheduler will read."""

import ipaddress
import math
import os
import re
from collections.abc import Iterator

from dsllm.config.check import Problem
from dsllm.config.cluster import ClusterConfig, ContainerConfig, SlurmConfig

_HOST_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
"""A host's name; excludes what ssh could read as an option, or a shell as a command."""

_LONGEST_SHOWN = 80

MOST_RANKS = 1_000_000
"""More than any machine runs; a larger number is a mistake."""

_MOST_SECONDS = 10_000_000
"""Some months."""

_USER_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"

_VARIABLE_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_SET_BY_LAUNCHERS = (
    r"(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|LOCAL_SIZE|MASTER_(ADDR|PORT)"
    r"|(SLURM|OMPI_COMM|PMIX|TORCHELASTIC)_.*|DSLLM_JOB"
)
_TIME_LIMIT = r"\d+|(\d+:)?\d+:\d+|\d+-\d+(:\d+){0,2}"


def problems_in_cluster(cluster: ClusterConfig) -> list[Problem]:
    """Everything in the cluster that cannot work, or that a shell would misread."""
    return [
        *_check_hosts(cluster),
        *_check_numbers(cluster),
        *_check_words(cluster),
        *_check_environment(cluster),
        *_check_launcher(cluster),
        *(_check_slurm(cluster.slurm) if cluster.slurm else ()),
        *(_check_container(cluster, cluster.container) if cluster.container else ()),
    ]


def is_host(name: str) -> bool:
    """Whether a text is a host's name or IP address, and nothing else to a shell or to ssh."""
    return re.fullmatch(_HOST_NAME, name) is not None or is_ipv6(name)


def is_ipv6(name: str) -> bool:
    """Whether a text is an IPv6 address that means the same on every host, so without an interface (%eth0)."""
    try:
        return ipaddress.IPv6Address(name).scope_id is None
    except ValueError:
        return False


def problem_of_host(name: str) -> str | None:
    """What is wrong with a host's name as ssh takes it; None: nothing."""
    user, at, host = name.rpartition("@")
    if at and not re.fullmatch(_USER_NAME, user):
        return f"{_shown(user)!r} is not a user name: write USER@HOST"
    if not is_host(host):
        return (
            f"{_shown(host)!r} is not a host name: use letters, digits, '.', '-' and '_' only, or an IP address (a port "
            "belongs in ssh.port of the cluster file)"
        )
    return None


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _check_hosts(cluster: ClusterConfig) -> Iterator[Problem]:
    names = [host.address.lower() for host in cluster.hosts]
    for i, host in enumerate(cluster.hosts):
        where = f"hosts.{i}"
        if problem := problem_of_host(host.name):
            yield f"{where}.name", problem
        if (first := names.index(host.address.lower())) != i:
            yield f"{where}.name", f"'{host.name}' is already host {first}; name each host once, with all its slots"
        yield from _from_1_to(MOST_RANKS, f"{where}.slots", host.slots)
    if cluster.num_ranks > MOST_RANKS:
        yield "hosts", f"have {cluster.num_ranks:,} slots together; a job has at most {MOST_RANKS:,} ranks"


def _check_numbers(cluster: ClusterConfig) -> Iterator[Problem]:
    yield from _from_1_to(65535, "port", cluster.port)
    yield from _from_1_to(65535, "ssh.port", cluster.ssh.port)
    yield from _from_1_to(MOST_RANKS, "slots", cluster.slots)
    for name in ("save_seconds", "end_seconds", "connect_seconds"):
        value = getattr(cluster.timeouts, name)
        if not 0 < value <= _MOST_SECONDS:
            yield f"timeouts.{name}", f"must be above 0 and at most {_MOST_SECONDS:,}, but it is {value}"


def _from_1_to(most: int, field: str, value: int | None) -> Iterator[Problem]:
    if value is not None and not 1 <= value <= most:
        yield field, f"must be at least 1 and at most {most}, but it is {value}"


def _check_words(cluster: ClusterConfig) -> Iterator[Problem]:
    """Names that scripts and launchers use unquoted, and texts that no command line can contain."""
    if cluster.interface is not None and not re.fullmatch(r"[A-Za-z0-9_.:@-]+", cluster.interface):
        yield "interface", f"{cluster.interface!r} is not the name of a network interface"
    if cluster.master_address is not None and not is_host(cluster.master_address):
        yield "master_address", f"{cluster.master_address!r} is neither a host name nor an IP address"
    for i, name in enumerate(cluster.modules):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+/-]*", name):
            yield f"modules.{i}", f"{name!r} is not the name of a module"
    texts = {
        **{name: getattr(cluster, name) for name in ("hostfile", "shared_directory", "virtual_environment")},
        **{f"ssh.options.{i}": word for i, word in enumerate(cluster.ssh.options)},
        **{f"mpi.options.{i}": word for i, word in enumerate(cluster.mpi.options)},
        "mpi.program": cluster.mpi.program,
    }
    for field, text in texts.items():
        if text is not None and re.search(r"[\0\n\r]", text):
            yield field, f"{text!r} contains a line break"


def _check_environment(cluster: ClusterConfig) -> Iterator[Problem]:
    for name, value in cluster.environment.items():
        where = f"environment.{name}"
        if not re.fullmatch(_VARIABLE_NAME, name):
            yield where, f"{name!r} is not a variable name: use letters, digits and '_' only"
        elif re.fullmatch(_SET_BY_LAUNCHERS, name):
            yield (
                where,
                "is set by the launcher; remove it (port, master_address and hosts are fields of the cluster)",
            )
        is_odd = isinstance(value, float) and not math.isfinite(value)  # .nan: perhaps the program's own word
        if is_odd or isinstance(value, bool) or not isinstance(value, str | int | float):
            yield where, f"must be text or a number, but it is {value!r}; put it in quotes, as the program expects it"
        elif "\0" in str(value):
            yield where, "contains a NUL character, which no variable can"


def _check_launcher(cluster: ClusterConfig) -> Iterator[Problem]:
    chosen = cluster.chosen_launcher
    if chosen == "slurm" and cluster.slurm is None:
        yield "launcher", "slurm needs a section slurm: partition, nodes, tasks_per_node, time_limit"
    if chosen == "torchrun" and len({host.slots for host in cluster.hosts}) > 1:
        yield "hosts", "torchrun needs the same number of slots on every host; deepspeed does not"
    if chosen == "mpi":
        for i, host in enumerate(cluster.hosts):
            if is_ipv6(host.address):
                yield (
                    f"hosts.{i}.name",
                    f"{host.address} is an IPv6 address, which Open MPI does not read in a hostfile: use a name",
                )


def _check_slurm(slurm: SlurmConfig) -> Iterator[Problem]:
    for name in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task"):
        yield from _from_1_to(MOST_RANKS, f"slurm.{name}", getattr(slurm, name))
    yield from _from_1_to(65535, "slurm.signal_seconds", slurm.signal_seconds)  # SLURM's limit
    if 1 <= slurm.nodes <= MOST_RANKS < slurm.nodes * slurm.tasks_per_node:
        yield "slurm.tasks_per_node", f"x {slurm.nodes} nodes: a job has at most {MOST_RANKS:,} ranks"
    for name in ("partition", "account", "qos", "gres", "memory"):
        value = getattr(slurm, name)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,:=()+-]*", str(value)):
            yield f"slurm.{name}", f"{value!r} contains other characters than letters, digits and ._,:=()+-"
    if slurm.time_limit is not None and not re.fullmatch(_TIME_LIMIT, str(slurm.time_limit)):
        yield (
            "slurm.time_limit",
            f"{slurm.time_limit!r} is not minutes, hours:minutes:seconds or days-hours:minutes:seconds",
        )
    elif slurm.time_limit is not None and 2 * slurm.signal_seconds > (limit := seconds_of(str(slurm.time_limit))):
        yield (
            "slurm.signal_seconds",
            f"{slurm.signal_seconds} leaves too little of time_limit {slurm.time_limit} ({limit} s): a job that gets the "
            "signal before its first step saves nothing, and restarts forever; set at most half of the limit",
        )
    if slurm.gpus_per_node is not None and slurm.gres is not None and "gpu" in slurm.gres:
        yield "slurm.gpus_per_node", f"gres {slurm.gres} requests GPUs too; set one of the two"
    for i, option in enumerate(slurm.options):
        if not re.fullmatch(r"--[a-z][a-z-]*(=[^\s#]+)?", option):
            yield (
                f"slurm.options.{i}",
                f"{option!r} is not an option of the form --name or --name=value, without blanks",
            )


def _check_container(cluster: ClusterConfig, container: ContainerConfig) -> Iterator[Problem]:
    if container.runtime == "pyxis" and (cluster.slurm is None or cluster.slurm.start != "srun"):
        yield "container.runtime", "pyxis works only under srun: use launcher slurm with start srun, or apptainer"
    texts = [("image", container.image), *((f"mounts.{i}", m) for i, m in enumerate(container.mounts))]
    for field, text in texts:
        if not text or re.search(r"[\0\n\r,]", text) or text.startswith("-"):
            yield (
                f"container.{field}",
                f"{text!r} is not an image or path: remove line breaks, commas and a '-' at the start",
            )


def seconds_of(time_limit: str) -> int:
    """A time limit as SLURM reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, *parts, 0) if len(parts) == 1 else (0, *parts)[-3:]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def missing_hosts(cluster: ClusterConfig) -> Iterator[Problem]:
    """The problem of a cluster file that names no host: the job would run on this machine alone."""
    chosen = cluster.chosen_launcher
    if chosen in ("deepspeed", "torchrun", "mpi") and not cluster.hosts and cluster.slots is None:
        yield "launcher", f"{chosen} needs hosts or a hostfile; for this machine alone set slots"


def unset_variables(text: str) -> list[str]:
    """Names of the variables in a path, written $NAME or ${NAME}, that are not set here."""
    named = re.findall(r"\$(?:\{([^}]*)\}|(\w+))", text)
    return [name for name in (braced or plain for braced, plain in named) if name not in os.environ]
