"""SLURM: writes the batch script, both for `dsllm launch` and for the templates in launch/slurm."""

import dataclasses
import shlex

from dsllm.config.cluster import ClusterConfig, SlurmConfig
from dsllm.config.load_cluster import cluster_text
from dsllm.launch.job import JOB_VARIABLE, Job, Launch, in_container, preparation, python_of, quoted

SUBMIT = "sbatch"
"""Stands in place of a host's name: the only command of a SLURM launch submits the job."""

CLUSTER_FILE = "cluster.yaml"


def slurm_launch(job: Job, cluster: ClusterConfig) -> Launch:
    """The batch script and the command that submits it; SLURM writes the output into the job's folder."""
    file = job.folder / "job.sbatch"
    pattern = str(job.folder).replace("%", "%%")  # SLURM replaces %x
    command = ("sbatch", "--parsable", f"--chdir={job.directory}", f"--output={pattern}/slurm-%j.log", str(file))
    files = {file: batch_script(cluster, job)}
    if cluster.slurm and cluster.slurm.start == "ssh":
        files[job.folder / CLUSTER_FILE] = cluster_text(dataclasses.replace(cluster, slurm=None, launcher=None))
    return Launch(files=files, commands={SUBMIT: command})


def batch_script(cluster: ClusterConfig, job: Job | None, about: str = "") -> str:
    """The whole script.

    Args:
        job: None: the script is a template, and takes the arguments of `dsllm train` from sbatch's command line.
    """
    slurm = cluster.slurm
    assert slurm is not None, "checked when the cluster was loaded"
    head = ["#!/bin/bash", *[f"#SBATCH {option}" for option in _options(slurm, job)]]
    what = about or f"# Written by dsllm launch: the job {job.name if job else ''}."
    start = _start_by_srun(cluster) if slurm.start == "srun" else _start_by_ssh(job)
    parts = [*head, "#", what, "set -e", *_environment(cluster, job), "", *start, "", *_until_the_end()]
    return "\n".join(parts) + "\n"


def _options(slurm: SlurmConfig, job: Job | None) -> list[str]:
    """The options at the head of the script; the cluster's check has made sure that each is one word."""
    values = {
        "job-name": (job.run_name if job else "dsllm"),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.tasks_per_node,
        "gpus-per-node": slurm.gpus_per_node,
        "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time_limit,
        "signal": f"B:USR1@{slurm.signal_seconds}" if slurm.time_limit else None,
        "open-mode": "append",
    }
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    if job is None:
        options.append("--output=%x-%j.log")
    return [*options, "--requeue" if slurm.requeue else "--no-requeue", *slurm.options]


def _environment(cluster: ClusterConfig, job: Job | None) -> list[str]:
    """The lines that set the arguments of `dsllm train`, the Python and the address of rank 0."""
    lines = preparation(cluster)
    if job:
        lines += [f"set -- {quoted(job.words)}", f"python={shlex.quote(python_of(cluster))}"]
        lines += [f"export {JOB_VARIABLE}={job.name}"]
    else:
        lines += [
            "# The environment is the one in which sbatch is called, or VENV=/path/to/venv sbatch ...",
            'if [ -n "${VENV:-}" ]; then . "$VENV/bin/activate"; fi',
            "python=python",
        ]
    return [
        *lines,
        "# A port made from the job's number, so that two jobs on one node do not meet",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        """MASTER_ADDR=$(scontrol -o show node "$first" | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')""",
        "export MASTER_ADDR",
        'echo "job $SLURM_JOB_ID, restarts ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks, the first at $MASTER_ADDR"',
    ]


def _start_by_srun(cluster: ClusterConfig) -> list[str]:
    """The lines that start one task per rank."""
    # no kill-on-bad-exit: ranks that have saved exit with 75, a moment apart; --wait ends the rest later
    words = ["srun", "--mpi=none", "--kill-on-bad-exit=0", f"--wait={cluster.timeouts.end_seconds:.0f}"]
    container = cluster.container
    if container and container.runtime == "pyxis":
        words.append(f"--container-image={container.image}")
        if container.mounts:
            words.append(f"--container-mounts={','.join(m if ':' in m else f'{m}:{m}' for m in container.mounts)}")
        words += ['--container-workdir="$PWD"', *container.options]
    srun = " ".join(word if word.startswith("--container-workdir") else shlex.quote(word) for word in words)
    python = " ".join([*(shlex.quote(word) for word in in_container(cluster)), '"$python"'])
    return [
        "# sbatch's number of cores reaches srun only through this variable",
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
        f'{srun} {python} -u -m dsllm train "$@" &',
    ]


def _start_by_ssh(job: Job | None) -> list[str]:
    """The lines that start DeepSpeed's launcher on each host, for clusters whose nodes reach each other by ssh."""
    cluster = f"--cluster={shlex.quote(str(job.folder / CLUSTER_FILE))} " if job else ""
    if job:
        hosts = [f"hosts={shlex.quote(str(job.folder / 'hosts'))}"]
    else:
        hosts = ['hosts="dsllm-hosts.$SLURM_JOB_ID"', "trap 'rm -f \"$hosts\"' EXIT"]
    return [
        *hosts,
        'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\\$/ slots=$SLURM_NTASKS_PER_NODE/" > "$hosts"',
        f'"$python" -u -m dsllm launch "$@" {cluster}--hostfile="$hosts" --with=deepspeed &',
    ]


def _until_the_end() -> list[str]:
    """The lines that wait, forward signals and report how it ended; code 75 (saved) starts the job again."""
    return [
        "ranks=$!",
        "warned= cancelled=",
        "trap 'warned=1; echo \"the time limit is near: saving\"; kill -USR1 $ranks' USR1  # srun forwards it to all ranks",
        "trap 'cancelled=1' TERM  # SLURM sends it to the ranks itself",
        "while :; do  # a signal interrupts wait",
        "    code=0; wait $ranks || code=$?",
        "    kill -0 $ranks 2> /dev/null || break",
        "done",
        'echo "job $SLURM_JOB_ID: the ranks ended with code $code"',
        'if [ $code != 0 ] && { [ -n "$warned" ] || { [ $code = 75 ] && [ -z "$cancelled" ]; }; }; then',
        '    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # SLURM ends this script and starts it again',
        "fi",
        "exit $code",
    ]
