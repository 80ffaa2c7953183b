"""Starts a job on hosts reached by ssh, or on this machine: a script on each host starts DeepSpeed's or torch's launcher."""

import os
import re
import shlex
from pathlib import Path

from dsllm.config.cluster import ClusterConfig
from dsllm.config.hostfile import hostfile_text
from dsllm.launch.job import Job, Launch, in_container, port_of, python_of, quoted, script
from dsllm.processes import free_port

THIS_MACHINE = "localhost"
SILENT_PROBES = 3
"""ssh probes a host every connect_seconds; after so many without an answer the host counts as lost."""


def ssh_launch(job: Job, cluster: ClusterConfig, with_torchrun: bool) -> Launch:
    """One script for all hosts, and an ssh command for each.

    DeepSpeed's default, pdsh, is not used: it mangles arguments, and its stop command ends every job on the hosts.
    `deepspeed --no_ssh`, once per host, does neither.
    """
    hostfile, node = job.folder / "hosts", job.folder / "node.sh"
    address, port = cluster.master_address or cluster.hosts[0].address, port_of(job, cluster)
    if with_torchrun:
        start = [
            *("-m", "torch.distributed.run", "--nnodes", str(len(cluster.hosts))),
            *("--nproc-per-node", str(cluster.hosts[0].slots), "--node-rank", '"$1"'),
            *("--master-addr", address, "--master-port", str(port), "--module"),
        ]
    else:
        start = [
            *("-m", "deepspeed.launcher.runner", "--hostfile", shlex.quote(str(hostfile)), "--no_ssh"),
            *("--node_rank", '"$1"', "--master_addr", address, "--master_port", str(port)),
            *("--no_local_rank", "--module"),
        ]
    about = f"Starts one host's ranks of the job {job.name}."
    text = script(about, job, cluster, _watched_launcher(job, cluster, start, port))
    commands = {host.name: ssh_command(cluster, host.name, node, str(i)) for i, host in enumerate(cluster.hosts)}
    return Launch(files={hostfile: hostfile_text(cluster.hosts), node: text}, commands=commands)


def local_launch(job: Job, cluster: ClusterConfig, with_torchrun: bool) -> Launch:
    """A script for this machine alone."""
    node, port = job.folder / "node.sh", cluster.port or free_port()
    if with_torchrun:
        start = [
            *("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(local_slots(cluster))),
            *("--master-addr", "127.0.0.1", "--master-port", str(port), "--module"),
        ]
    else:
        start = [
            *("-m", "deepspeed.launcher.runner", *_devices(cluster)),
            *("--master_addr", "127.0.0.1", "--master_port", str(port), "--no_local_rank", "--module"),
        ]
    about = f"Starts the ranks of the job {job.name}."
    text = script(about, job, cluster, _watched_launcher(job, cluster, start, port))
    return Launch(files={node: text}, commands={THIS_MACHINE: ("bash", str(node), "0")})


def _watched_launcher(job: Job, cluster: ClusterConfig, start: list[str], port: int) -> str:
    """The shell text that runs a launcher under our watcher.

    Args:
        start: the launcher's own words, already shell text; `job.words` are plain words.
    """
    launcher = " ".join([quoted([python_of(cluster)]), *start, "dsllm", "train", quoted(job.words)])
    python = quoted([*in_container(cluster), python_of(cluster)])
    return f"{watcher_command(python, cluster)} --port={port} -- \\\n    {launcher}"


def watcher_command(python: str, cluster: ClusterConfig) -> str:
    """The start of the command that runs dsllm/launch/node.py, as shell text; `$1` is the host's number."""
    waits = f"--save-seconds={cluster.timeouts.save_seconds:g} --end-seconds={cluster.timeouts.end_seconds:g}"
    return f'{python} -u -m dsllm.launch.node --node="$1" {waits}'


def ssh_command(cluster: ClusterConfig, host: str, file: Path, *arguments: str) -> tuple[str, ...]:
    """The words that run one of the job's scripts on a host."""
    seconds = cluster.timeouts.connect_seconds
    return (
        *("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}"),
        *("-o", f"ServerAliveInterval={seconds}", "-o", f"ServerAliveCountMax={SILENT_PROBES}"),
        *(("-p", str(cluster.ssh.port)) if cluster.ssh.port else ()),
        *cluster.ssh.options,
        *(
            host,
            f"exec bash {quoted([str(file), *arguments])}",
        ),  # quoted: the shell on the host reads these words again
    )


def visible_gpus() -> list[str]:
    """Numbers of the GPUs of this machine that CUDA would see, without torch."""
    present = [str(i) for i, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not present:
        return present
    return [word.strip() for word in chosen.split(",") if word.strip()]


def local_slots(cluster: ClusterConfig) -> int:
    """Ranks of a local run: those of the cluster file, else one per GPU, else one."""
    return cluster.slots or len(visible_gpus()) or 1


def _devices(cluster: ClusterConfig) -> list[str]:
    """The words with which DeepSpeed's launcher starts the ranks of this machine."""
    gpus = visible_gpus()
    if cluster.slots is None and gpus and all(re.fullmatch(r"\d+", gpu) for gpu in gpus):
        return ["--include", f"{THIS_MACHINE}:{','.join(gpus)}"]  # --num_gpus would ignore CUDA_VISIBLE_DEVICES
    return ["--num_gpus", str(local_slots(cluster))]
