"""SLURM on the hosts: munged and slurmctld on the login host, a slurmd on each node; nothing outside their own folder."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import ADDRESSES, DIE_WITH_PARENT, LOGIN, NODES, Hosts, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
KILL_WAIT_SECONDS = 10
"""From SIGTERM to SIGKILL when SLURM ends a job."""
UP_SECONDS = 30

# A GPU in name only (its device is a file), so that a script that requests one is accepted here
CONFIG = """
ClusterName=test
SlurmctldHost={login}({login_address})
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait={kill_wait}
JobRequeue=1
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeAddr={address} Port={port} CPUs=8 RealMemory=4000 Gres=gpu:1"


@dataclass(frozen=True)
class Slurm:
    """A running SLURM and the hosts it runs on."""

    hosts: Hosts

    def run(self, *words: str, folder: Path = Path("/"), check: bool = True) -> str:
        """A SLURM command on the login host; its output."""
        done = subprocess.run(
            self.hosts.login.command(words, folder), env=environment(), capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job, as `scontrol show job` prints them."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_state(self, number: str, states: Sequence[str], seconds: float) -> dict[str, str]:
        """Until the job is in one of the states; its fields."""
        deadline = time.monotonic() + seconds
        while (fields := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {fields['JobState']} after {seconds} s"
            time.sleep(0.2)
        return fields


@contextlib.contextmanager
def start_slurm(hosts: Hosts) -> Iterator[Slurm]:
    """SLURM on the hosts until the block ends; jobs that are left then are cancelled, and killed."""
    folder = hosts.folder / "slurm"  # every host sees it as /etc/slurm
    _write_settings(folder)
    daemons: list[subprocess.Popen] = []
    slurm = Slurm(hosts)
    try:
        munged = ["munged", "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
        munged += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        daemons.append(_start(hosts, LOGIN, munged))
        daemons.append(_start(hosts, LOGIN, ["slurmctld", "-D", "-c"]))
        for name in NODES:
            daemons.append(_start(hosts, name, ["slurmd", "-D", "-N", name]))
        _wait_until_idle(slurm)
        yield slurm
    finally:
        slurm.run("scancel", "--user=root", check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def _write_settings(folder: Path) -> None:
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gres.conf\n")
    nodes = [NODE.format(name=name, address=ADDRESSES[name], port=17001 + i) for i, name in enumerate(NODES)]
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            folder=folder,
            login=LOGIN,
            login_address=ADDRESSES[LOGIN],
            kill_wait=KILL_WAIT_SECONDS,
            nodes="\n".join(nodes),
        )
    )


def _start(hosts: Hosts, name: str, words: Sequence[str]) -> subprocess.Popen:
    program = shutil.which(words[0], path=environment()["PATH"])
    with (hosts.folder / f"{words[0]}.{name}.out").open("w") as log:
        return subprocess.Popen(
            [*DIE_WITH_PARENT, *hosts.hosts[name].command([str(program), *words[1:]])],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_until_idle(slurm: Slurm) -> None:
    deadline = time.monotonic() + UP_SECONDS
    while (states := slurm.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()) != ["idle"] * 2:
        assert time.monotonic() < deadline, f"SLURM's nodes are {states} after {UP_SECONDS} s"
        time.sleep(0.2)
