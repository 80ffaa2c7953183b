"""Network interfaces of a rank's host: which of them gloo and NCCL will use, and whether rank 0's host can be reached."""

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsllm.byte_units import KIB
from dsllm.doctor.findings import Finding, Place, advice_if, check, error_if, one_per_host, where
from dsllm.doctor.machine import UNLIMITED, Machine

REACH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface that is up and has an address."""

    name: str
    addresses: tuple[str, ...]
    megabits: int
    """Speed that the driver reports; 0: it reports none."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network as one rank sees it."""

    interfaces: tuple[Interface, ...]
    infiniband: tuple[str, ...]
    """Adapters with an active port."""
    gloo: str
    """The interface that gloo will use, with its address; empty: none."""
    nccl: tuple[str, ...]
    """The interfaces that NCCL will use for its sockets, best first."""
    problem: str = ""
    """Why gloo or NCCL has no interface; empty: both have one."""


def look_at_network(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Network:
    """The interfaces of this host, and those that gloo and NCCL will choose."""
    interfaces = _interfaces()
    gloo, problem = gloo_interface(interfaces, environment.get("GLOO_SOCKET_IFNAME", ""), _own_addresses())
    nccl = nccl_interfaces([interface.name for interface in interfaces], environment.get("NCCL_SOCKET_IFNAME", ""))
    if not nccl and not problem:
        problem = f"NCCL_SOCKET_IFNAME={environment.get('NCCL_SOCKET_IFNAME', '')} names no interface that is up"
    return Network(interfaces=interfaces, infiniband=_infiniband(root), gloo=gloo, nccl=nccl, problem=problem)


def _interfaces() -> tuple[Interface, ...]:
    states, found = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        own = tuple(a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        if own and name in states and states[name].isup:
            speed = states[name].speed
            found.append(Interface(name=name, addresses=own, megabits=speed if 0 < speed < 2**31 - 1 else 0))
    return tuple(found)


def _own_addresses() -> list[str]:
    """The addresses that this host's own name resolves to, in the order in which gloo tries them."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(item[4][0]) for item in found]


def gloo_interface(interfaces: tuple[Interface, ...], variable: str, own_addresses: list[str]) -> tuple[str, str]:
    """The interface that torch's gloo uses, with its address, and what is wrong with it.

    torch takes GLOO_SOCKET_IFNAME, else the first address of the host's own name that belongs to this host, else the
    loopback (ProcessGroupGloo::createDefaultDevice).

    Args:
        variable: value of GLOO_SOCKET_IFNAME; empty: not set.
    """
    if variable:
        first = variable.split(",")[0]
        for interface in interfaces:
            if interface.name == first:
                return f"{interface.name} {interface.addresses[0]}", ""
        known = ", ".join(interface.name for interface in interfaces)
        return "", f"GLOO_SOCKET_IFNAME={variable}: no such interface is up; there are {known}"
    for address in own_addresses:
        for interface in interfaces:
            if address in interface.addresses or (address.startswith("127.") and interface.name == "lo"):
                return f"{interface.name} {address}", ""
    return "lo 127.0.0.1", "the host's own name resolves to none of its addresses"


def nccl_interfaces(names: list[str], variable: str) -> tuple[str, ...]:
    """The interfaces that NCCL uses for sockets, best first (NCCL's user guide).

    Without the variable these are ib*, else all but docker* and lo, else docker*, else lo.

    Args:
        variable: value of NCCL_SOCKET_IFNAME: prefixes of names; after = whole names; after ^ those to leave out.
    """
    if variable:
        leave_out, words = variable.startswith("^"), variable.lstrip("^=").split(",")
        whole = variable.lstrip("^").startswith("=")
        named = [n for n in names if any(n == word if whole else n.startswith(word) for word in words)]
        return tuple(n for n in names if n not in named) if leave_out else tuple(named)
    groups = (
        [n for n in names if n.startswith("ib")],
        [n for n in names if not n.startswith(("ib", "docker", "lo"))],
        [n for n in names if n.startswith("docker")],
        [n for n in names if n.startswith("lo")],
    )
    return tuple(next((group for group in groups if group), []))


def _infiniband(root: Path) -> tuple[str, ...]:
    found = []
    for adapter in sorted((root / "sys/class/infiniband").glob("*")):
        states = [state.read_text(encoding="utf-8") for state in adapter.glob("ports/*/state")]
        if any("ACTIVE" in state for state in states):
            found.append(adapter.name)
    return tuple(found)


def why_unreachable(address: str, port: int, seconds: float = REACH_SECONDS) -> str:
    """Why rank 0's store cannot be reached from here; empty: it can be, at this moment."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return ""
    except ConnectionRefusedError:
        return (
            f"{address} answers, but nothing listens at port {port}: rank 0 has not started, or this host has another "
            "master address or port"
        )
    except TimeoutError:
        return f"{address} does not answer within {seconds:g} s: a firewall, the wrong network, or a host that is down"
    except OSError as error:
        return f"{address}:{port} cannot be reached ({error.strerror or error})"


# fmt: off
# One row per check: name, where, level, problem, action.
def check_networks(networks: Mapping[Place, Network], machines: Mapping[Place, Machine], device: str) -> Iterator[Finding]:
    """Find what would keep the hosts from communicating, or make that slow."""
    hosts = one_per_host(networks)
    for place, own in hosts.items():
        yield from check("network", place.host, error_if(own.problem and (len(hosts) > 1 or not own.gloo)),
            own.problem,
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that connects the hosts, or unset them")
        interface, _, address = own.gloo.partition(" ")
        yield from check("network", place.host, error_if(len(hosts) > 1 and interface == "lo" and not own.problem),
            f"the host's name resolves to {address}; gloo will use that address, and other hosts cannot reach it",
            "GLOO_SOCKET_IFNAME=INTERFACE on this host, or fix its name in /etc/hosts")
        locked = machines[place].locked_memory
        yield from check("locked memory", place.host, advice_if(own.infiniband and locked < UNLIMITED and device == "cuda"),
            f"{', '.join(own.infiniband)} is there, but only {locked // KIB} KiB may be locked: RDMA will fail",
            "ulimit -l unlimited (docker --ulimit memlock=-1)")
    without = [place for place, own in hosts.items() if not own.infiniband]
    yield from check("network", where(without), error_if(0 < len(without) < len(hosts)),
        "no active InfiniBand port, while other hosts have one: all would fall back to sockets, or fail",
        "look at `ibstat` and the cabling there, or leave these hosts out")
