"""Open MPI: one script that becomes a rank, and one for this machine that runs mpirun under our watcher."""

import sys
from pathlib import Path

from dsllm.config.cluster import ClusterConfig
from dsllm.config.hostfile import hostfile_text
from dsllm.launch.hosts import THIS_MACHINE, local_slots, ssh_command, watcher_command
from dsllm.launch.job import Job, Launch, in_container, port_of, python_of, quoted, script
from dsllm.processes import free_port


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


def mpirun_words(cluster: ClusterConfig, hostfile: Path) -> list[str]:
    """The words of mpirun that say how many ranks, on which hosts, over which network."""
    words = ["-np", str(cluster.num_ranks or local_slots(cluster))]
    words += ["--hostfile", str(hostfile)] if cluster.hosts else ["--oversubscribe"]
    if cluster.interface:
        words += ["--mca", "btl_tcp_if_include", cluster.interface, "--mca", "oob_tcp_if_include", cluster.interface]
    return [*words, *cluster.mpi.options]
