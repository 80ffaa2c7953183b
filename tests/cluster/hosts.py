"""Three hosts on one Linux machine: a login host and two nodes, each a set of namespaces with its own sshd, on one bridge.

A host lives as long as the process that holds its namespaces, and that one dies with the process that made it (setpriv's
pdeathsig): network, mounts and, on the nodes, every process go with it. Nothing of the machine itself is changed.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOGIN, NODES = "login", ("n1", "n2")
ADDRESSES = {LOGIN: "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
UP_SECONDS = 30
"""Longest wait until ssh answers on a node; it takes under a second on a quiet machine."""

DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")

HOST = """
set -e
mount --bind {folder}/hosts /etc/hosts
[ ! -d /etc/slurm ] || mount --bind {folder}/slurm /etc/slurm
ip link set lo up
"""
AS_LOGIN = """
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link add br0 type bridge
ip addr add {address}/24 dev br0
ip link set br0 up
hostname {name}
exec sleep infinity
"""
AS_NODE = """
mount -t tmpfs none /run
mkdir /run/sshd
hostname {name}
exec {sshd} -D -e -f {folder}/sshd_config.{name}
"""

# a lost host is noticed after 3 x 5 s: without the last two lines ssh, and so pdsh, waits for it for a quarter of an hour
SSH_CONFIG = """
Host n1 n2
IdentityFile {folder}/id
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
ConnectTimeout 5
ServerAliveInterval 5
ServerAliveCountMax 3
"""
SSHD_CONFIG = """
Port 22
HostKey {folder}/key.{name}
PidFile none
AuthorizedKeysFile {folder}/id.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
"""


@dataclass
class Host:
    """One host: the process that holds its namespaces."""

    name: str
    holder: subprocess.Popen

    @property
    def pid(self) -> int:
        """The first process of the host, as the machine counts; 0: not there yet."""
        if self.name == LOGIN:
            return self.holder.pid
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def command(self, words: Sequence[str], folder: Path = Path("/")) -> list[str]:
        """The command that runs `words` on this host, in `folder`."""
        # a node's processes are its own; those of the login host stay children of who starts them
        spaces = ["--mount", "--uts", "--net", *([] if self.name == LOGIN else ["--pid"])]
        return ["nsenter", "--target", str(self.pid), *spaces, f"--wd={folder}", "--", *words]


@dataclass
class Hosts:
    """The login host and the nodes; all see one file system, as on a cluster with a shared one."""

    folder: Path
    """Keys, settings and logs of the hosts."""
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def login(self) -> Host:
        """Where jobs are started."""
        return self.hosts[LOGIN]

    def run(self, name: str, *words: str, check: bool = True) -> str:
        """Run a command on a host; its output."""
        done = subprocess.run(
            self.hosts[name].command(words), env=environment(), capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{name}: {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def cut(self, name: str) -> None:
        """Pull the cable of a node."""
        self.run(LOGIN, "ip", "link", "set", f"to-{name}", "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        self.run(LOGIN, "ip", "link", "set", f"to-{name}", "up")


def environment() -> dict[str, str]:
    """This process's environment with the system's own programs in reach."""
    return {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"}


def problems(also: Sequence[str] = ()) -> list[str]:
    """Why hosts cannot be made on this machine, or have not all these programs; empty where all is well."""
    if os.geteuid() != 0:
        return ["not root"]
    missing = [p for p in (*PROGRAMS, *also) if shutil.which(p, path=environment()["PATH"]) is None]
    if missing:
        return [f"{p} is not installed" for p in missing]
    probe = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", probe],
        env=environment(),
        capture_output=True,
        text=True,
    )
    return [] if done.returncode == 0 else [f"no namespaces or bridges here: {done.stderr.strip()}"]


@contextlib.contextmanager
def start_hosts(folder: Path) -> Iterator[Hosts]:
    """The three hosts, reachable from the login host by `ssh n1` and `ssh n2`, until the block ends."""
    hosts = Hosts(folder)
    _write_settings(folder)
    try:
        for name in ADDRESSES:
            hosts.hosts[name] = Host(name, _hold(folder, name))
        for name in ADDRESSES:
            _wait(lambda name=name: hosts.run(name, "hostname", check=False).strip() == name, f"{name} does not start")
        for name in NODES:
            _plug_in(hosts, name)
        for name in NODES:
            _wait(lambda name=name: hosts.run(LOGIN, "ssh", name, "hostname", check=False).strip() == name, folder)
        yield hosts
    finally:
        for host in hosts.hosts.values():
            host.holder.kill()
            host.holder.wait()


def _write_settings(folder: Path) -> None:
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    )
    (folder / "slurm").mkdir()
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    for file in ("id", *(f"key.{name}" for name in NODES)):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / file], check=True)
    known = [f"{name} {' '.join((folder / f'key.{name}.pub').read_text().split()[:2])}\n" for name in NODES]
    (folder / "known_hosts").write_text("".join(known))
    for name in NODES:
        (folder / f"sshd_config.{name}").write_text(SSHD_CONFIG.format(folder=folder, name=name))


def _hold(folder: Path, name: str) -> subprocess.Popen:
    sshd = shutil.which("sshd", path=environment()["PATH"])  # sshd insists on its full path
    spaces = ["--mount", "--uts", "--net"]
    if name != LOGIN:
        spaces += ["--pid", "--fork", "--kill-child", "--mount-proc"]
    script = (HOST + (AS_LOGIN if name == LOGIN else AS_NODE)).format(
        folder=folder, name=name, address=ADDRESSES[name], sshd=sshd
    )
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [*DIE_WITH_PARENT, "unshare", *spaces, "sh", "-c", script],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is for the tests, not for the hosts
        )


def _plug_in(hosts: Hosts, name: str) -> None:
    """A cable from the node's eth0 to the bridge."""
    peer = ["type", "veth", "peer", "name", "eth0", "netns", str(hosts.hosts[name].pid)]
    hosts.run(LOGIN, "ip", "link", "add", f"to-{name}", *peer)
    hosts.run(LOGIN, "ip", "link", "set", f"to-{name}", "master", "br0", "up")
    hosts.run(name, "ip", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
    hosts.run(name, "ip", "link", "set", "eth0", "up")


def _wait(ready, what: object) -> None:
    deadline = time.monotonic() + UP_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"not ready after {UP_SECONDS} s: {what}"
        time.sleep(0.1)
