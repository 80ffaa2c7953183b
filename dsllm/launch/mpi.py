"""Open MPI: one script that becomes a rank, and one for this machine that runs mpirun under our watcher."""

import subprocess
import sys
from pathlib import Path

from dsllm.config.cluster import ClusterConfig
from dsllm.config.hostfile import hostfile_text
from dsllm.errors import LaunchError
from dsllm.launch.hosts import THIS_MACHINE, local_slots, ssh_command, watcher_command
from dsllm.launch.job import Job, Launch, in_container, port_of, python_of, quoted, script
from dsllm.processes import free_port

_VERSION_SECONDS = 30.0


def mpi_launch(job: Job, cluster: ClusterConfig) -> Launch:
    """The hostfile, both scripts, and the mpirun command.

    Ranks get the address of rank 0's store in their environment, so mpi4py is not needed.
    """
    hostfile, rank, node = job.folder / "hosts", job.folder / "rank.sh", job.folder / "node.sh"
    address = cluster.master_address or (cluster.hosts[0].address if cluster.hosts else "127.0.0.1")
    port = port_of(job, cluster) if cluster.hosts else cluster.port or free_port()
    train = quoted([*in_container(cluster), python_of(cluster), "-u", "-m", "dsllm", "train", *job.words])
    store = f"env MASTER_ADDR={address} MASTER_PORT={port}"  # in the rank's script: mpirun passes on only what -x names
    mpirun = quoted([cluster.mpi.program, *mpirun_words(cluster, hostfile), "bash", str(rank), "0"])
    # a second after a SIGTERM mpirun kills its ranks, but it forwards SIGUSR1 to them: they save
    watcher = f"{watcher_command(quoted([sys.executable]), cluster)} --stop-command-by=SIGUSR1"
    files = {
        rank: script(f"Becomes one rank of the job {job.name}.", job, cluster, f"{store} {train}"),
        node: script(f"Starts the ranks of the job {job.name}.", job, cluster, f"{watcher} -- \\\n    {mpirun}"),
    }
    commands: dict[str, tuple[str, ...]] = {THIS_MACHINE: ("bash", str(node), "0")}
    if not cluster.hosts:
        return Launch(files=files, commands=commands)
    files[hostfile] = hostfile_text(cluster.hosts)
    sweep = job.folder / "sweep.sh"
    files[sweep] = script(f"Ends what remains of the job {job.name} on a host.", job, cluster, f"{watcher} -- true")
    return Launch(
        files=files,
        commands=commands,
        sweeps={host.name: ssh_command(cluster, host.name, sweep, "0") for host in cluster.hosts},
    )


def refuse_other_mpi(cluster: ClusterConfig) -> None:
    """The words of mpirun below are Open MPI's: another MPI would stop at the first one that it does not know.

    Raises:
        LaunchError: mpirun is not there, or belongs to another MPI.
    """
    if cluster.modules or cluster.virtual_environment:  # these may bring another mpirun
        return
    program = cluster.mpi.program
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False, timeout=_VERSION_SECONDS
        )
    except OSError as error:
        raise LaunchError(f"mpi.program {program}: cannot be started here: {error.strerror or error}") from error
    except subprocess.TimeoutExpired:
        return  # a slow file system; mpirun itself will say what is wrong
    found = (done.stdout or done.stderr).strip().partition("\n")[0]
    if done.returncode == 0 and "Open MPI" not in found and "OpenRTE" not in found:
        raise LaunchError(
            f"mpi.program {program} is not Open MPI's ({found[:80]!r}): name Open MPI's mpirun, or use --with deepspeed or "
            "torchrun on the same hosts. MPICH's and Intel MPI's mpiexec can start `dsllm train` itself: docs/launch.md"
        )


def mpirun_words(cluster: ClusterConfig, hostfile: Path) -> list[str]:
    """The words of mpirun that say how many ranks, on which hosts, over which network."""
    words = ["-np", str(cluster.num_ranks or local_slots(cluster))]
    words += ["--hostfile", str(hostfile)] if cluster.hosts else ["--oversubscribe"]
    if cluster.interface:
        words += ["--mca", "btl_tcp_if_include", cluster.interface, "--mca", "oob_tcp_if_include", cluster.interface]
    return [*words, *cluster.mpi.options]
