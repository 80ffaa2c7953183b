"""The batch script: words and variables reach every task untouched, signals are handed on, and 75 starts the job again.

SLURM's commands are small scripts here, for speed; tests of real ones submit the same script.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dsllm.config.cluster import ClusterConfig, ContainerConfig, SlurmConfig
from dsllm.config.load_cluster import load_cluster
from dsllm.launch.slurm import batch_script, slurm_launch
from tests.launch.jobs import HOSTILE, make_job, record, recording_cluster

SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_PROCID=0; "$@" & a=$!
export SLURM_PROCID=1; "$@" & b=$!
trap 'kill -USR1 $a $b' USR1
wait $a || code=$?; wait $b || code=$?; wait $b; exit ${code:-0}
"""
SCONTROL = """
case "$*" in
  'show hostnames nodes') printf 'node1\\nnode2\\n' ;;
  '-o show node node1') echo 'NodeName=node1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=h Version=22' ;;
  requeue*) echo "$*" >> requeued; exit 1 ;;
esac
"""
SLURM = SlurmConfig(nodes=2, tasks_per_node=1, time_limit=60, partition="gpu", gres="gpu:2", options=("--exclusive",))


@pytest.fixture
def commands(tmp_path) -> Path:
    """A folder with SLURM's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return folder


def start(text: str, folder: Path, commands: Path, *words: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, **variables, "PATH": f"{commands}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "nodes", "SLURM_NTASKS": "2"}
    environment |= {"SLURM_NTASKS_PER_NODE": "1"}
    (folder / "job.sbatch").write_text(text)
    return subprocess.Popen(
        ["bash", "job.sbatch", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_words_and_variables_reach_every_task_untouched(tmp_path, commands):
    job, cluster = make_job(tmp_path), recording_cluster(tmp_path, slurm=SLURM)
    with start(batch_script(cluster, job), job.directory, commands) as process:
        output = process.communicate(timeout=20)[0]
    assert process.returncode == 0, output
    for rank in (0, 1):
        assert tuple(record(job, rank)["argv"]) == ("-u", "-m", "dsllm", "train", *HOSTILE)
    assert "the first at 10.1.2.3" in output


def test_a_template_takes_its_words_from_sbatch_and_its_environment_from_venv(tmp_path, commands):
    job, venv = make_job(tmp_path), recording_cluster(tmp_path).virtual_environment
    variables = {f"V{i}": word for i, word in enumerate(HOSTILE)}
    with start(
        batch_script(ClusterConfig(slurm=SLURM), None), job.directory, commands, *HOSTILE, VENV=venv, **variables
    ) as process:
        process.communicate(timeout=20)
    assert tuple(record(job, 1)["argv"]) == ("-u", "-m", "dsllm", "train", *HOSTILE)


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("1", False), ("75", True)])
def test_saved_means_start_again(tmp_path, commands, code, requeued):
    job, cluster = make_job(tmp_path), recording_cluster(tmp_path, slurm=SLURM)
    with start(batch_script(cluster, job), job.directory, commands, EXIT_CODE=code) as process:
        process.communicate(timeout=20)
    assert process.returncode == int(code) and (job.directory / "requeued").exists() == requeued


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 75, True), (signal.SIGTERM, 75, False)],
    ids=["time limit", "scancel"],
)
def test_the_time_limits_signal_reaches_the_ranks(tmp_path, commands, number, code, requeued):
    job, cluster = make_job(tmp_path), recording_cluster(tmp_path, slurm=SLURM)
    python = Path(cluster.virtual_environment) / "bin" / "python"
    # SLURM itself sends a cancelled job's ranks their SIGTERM: here they leave by themselves
    python.write_text(
        "#!/bin/bash\ntrap 'exit 75' USR1\necho > up.$SLURM_PROCID\nfor i in {1..40}; do sleep 0.05; done; exit 75\n"
    )
    with start(batch_script(cluster, job), job.directory, commands) as process:
        while not all((job.directory / f"up.{rank}").exists() for rank in (0, 1)):
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == code and (job.directory / "requeued").exists() == requeued
    assert time.monotonic() - began < 1.5 or number == signal.SIGTERM


def test_the_head_requests_what_the_cluster_file_names(tmp_path):
    lines = batch_script(ClusterConfig(slurm=SLURM), make_job(tmp_path)).splitlines()
    head = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {
        "--nodes=2",
        "--partition=gpu",
        "--gres=gpu:2",
        "--time=60",
        "--signal=B:USR1@300",
        "--requeue",
        "--exclusive",
    } <= {*head}
    assert not [line for line in head if "None" in line]


def test_over_ssh_the_hosts_get_the_whole_cluster(tmp_path, commands):
    slurm = SlurmConfig(nodes=2, start="ssh")
    job, cluster = make_job(tmp_path), recording_cluster(tmp_path, slurm=slurm, interface="ib0")
    launch = slurm_launch(job, cluster)
    for path, text in launch.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with start(batch_script(cluster, job), job.directory, commands) as process:
        assert process.wait(20) == 0
    words = record(job)["argv"]
    assert tuple(words[3 : 4 + len(HOSTILE)]) == ("launch", *HOSTILE) and "--with=deepspeed" in words
    options = dict(word.split("=", 1) for word in words if word.startswith(("--cluster=", "--hostfile=")))
    inner = load_cluster(options["--cluster"], options["--hostfile"], "deepspeed")
    assert [host.name for host in inner.hosts] == ["node1", "node2"]
    assert inner.environment == cluster.environment and inner.interface == "ib0"


def test_containers_wrap_the_ranks(tmp_path):
    pyxis = ContainerConfig(image="docker://a b", runtime="pyxis", mounts=("/data", "/x:/y"))
    text = batch_script(ClusterConfig(slurm=SLURM, container=pyxis), make_job(tmp_path))
    assert "'--container-image=docker://a b' --container-mounts=/data:/data,/x:/y" in text
    apptainer = ContainerConfig(image="/i.sif", runtime="apptainer", mounts=("/data",))
    text = batch_script(ClusterConfig(slurm=SLURM, container=apptainer), make_job(tmp_path))
    assert 'apptainer exec --nv --bind /data /i.sif "$python" -u -m dsllm train' in text


def test_sbatch_gets_the_outputs_path_without_patterns(tmp_path):
    job = make_job(tmp_path)
    (words,) = slurm_launch(job, ClusterConfig(slurm=SLURM)).commands.values()
    assert (
        f"--output={str(job.folder).replace('%', '%%')}/slurm-%j.log" in words and f"--chdir={job.directory}" in words
    )
