"""SLURM: the batch script, the same for `dsllm launch` and for the templates in launch/slurm."""

import dataclasses
import shlex

from dsllm.config.cluster import ClusterConfig, SlurmConfig
from dsllm.config.load_cluster import cluster_text
from dsllm.launch.job import JOB_VARIABLE, Job, Launch, in_container, preparation, python_of, quoted

SUBMIT = "sbatch"
"""What this plan's only command runs on, in place of a host."""

CLUSTER_FILE = "cluster.yaml"


def slurm_launch(job: Job, cluster: ClusterConfig) -> Launch:
    """The batch script and the command that submits it; its output goes into the job's folder."""
    file = job.folder / "job.sbatch"
    pattern = str(job.folder).replace("%", "%%")  # SLURM replaces %x
    command = ("sbatch", "--parsable", f"--chdir={job.directory}", f"--output={pattern}/slurm-%j.log", str(file))
    files = {file: batch_script(cluster, job)}
    if cluster.slurm and cluster.slurm.start == "ssh":
        files[job.folder / CLUSTER_FILE] = cluster_text(dataclasses.replace(cluster, slurm=None, launcher=None))
    return Launch(files=files, commands={SUBMIT: command})


def batch_script(cluster: ClusterConfig, job: Job | None, about: str = "") -> str:
    """The whole script. Without a job it is a template: what to train comes from sbatch's command line."""
    slurm = cluster.slurm
    assert slurm is not None, "checked when the cluster was loaded"
    head = ["#!/bin/bash", *[f"#SBATCH {option}" for option in _options(slurm, job)]]
    what = about or f"# Written by dsllm launch: the job {job.name if job else ''}."
    start = _start_by_srun(cluster) if slurm.start == "srun" else _start_by_ssh(job)
    parts = [*head, "#", what, "set -e", *_environment(cluster, job), "", *start, "", *_until_the_end()]
    return "\n".join(parts) + "\n"


def _options(slurm: SlurmConfig, job: Job | None) -> list[str]:
    """For the head of the script; everything in them was checked to be one word."""
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
    """What is trained, with which Python."""
    lines = preparation(cluster)
    if job:
        lines += [f"set -- {quoted(job.words)}", f"python={shlex.quote(python_of(cluster))}"]
        lines += [f"export {JOB_VARIABLE}={job.name}"]
    else:
        lines += [
            "# The environment: active when sbatch is called, or named: VENV=/path/to/venv sbatch ...",
            'if [ -n "${VENV:-}" ]; then . "$VENV/bin/activate"; fi',
            "python=python",
        ]
    return [
        *lines,
        "# Two jobs on one node are kept apart by the job's number",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        """MASTER_ADDR=$(scontrol -o show node "$first" | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')""",
        "export MASTER_ADDR",
        'echo "job $SLURM_JOB_ID, restarts ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks, the first at $MASTER_ADDR"',
    ]


def _start_by_srun(cluster: ClusterConfig) -> list[str]:
    """One task per rank. A failing rank ends the others: by their own error, or killed a minute later; not at once,
    because ranks that have saved leave with code 75, and a moment apart."""
    words = ["srun", "--mpi=none", "--kill-on-bad-exit=0", f"--wait={cluster.timeouts.end_seconds:.0f}"]
    box = cluster.container
    if box and box.runtime == "pyxis":
        words.append(f"--container-image={box.image}")
        if box.mounts:
            words.append(f"--container-mounts={','.join(m if ':' in m else f'{m}:{m}' for m in box.mounts)}")
        words += ['--container-workdir="$PWD"', *box.options]
    text = " ".join(word if word.startswith("--container-workdir") else shlex.quote(word) for word in words)
    inside = " ".join([*(shlex.quote(word) for word in in_container(cluster)), '"$python"'])
    return [
        "# srun hands on only what it is told about cores",
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
        f'{text} {inside} -u -m dsllm train "$@" &',
    ]


def _start_by_ssh(job: Job | None) -> list[str]:
    """DeepSpeed's launcher on each host, for clusters whose nodes reach each other by ssh."""
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
    """Wait, hand the signals on, and say how it ended; 75 (saved) starts the job again."""
    return [
        "ranks=$!",
        "warned= cancelled=",
        "trap 'warned=1; echo \"the time limit is near: saving\"; kill -USR1 $ranks' USR1  # srun hands it on to all ranks",
        "trap 'cancelled=1' TERM  # the ranks get it from SLURM",
        "while :; do  # a signal interrupts wait",
        "    code=0; wait $ranks || code=$?",
        "    kill -0 $ranks 2> /dev/null || break",
        "done",
        'echo "job $SLURM_JOB_ID: the ranks ended with code $code"',
        'if [ $code != 0 ] && { [ -n "$warned" ] || { [ $code = 75 ] && [ -z "$cancelled" ]; }; }; then',
        '    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # ends this script; it starts again from the checkpoint',
        "fi",
        "exit $code",
    ]
