"""dsllm launch over real ssh and real SLURM: two hosts train as one, stop as one, and none is left behind when one is lost."""

import signal
import sys

import psutil
import pytest
import yaml

from dsllm.launch.job import JOB_VARIABLE
from tests.cluster.hosts import NODES
from tests.helpers.launched import ENDLESS, EXACT, fingerprint, launch, losses, seconds_until_gone, status

pytestmark = pytest.mark.long

CLUSTER = {
    "hosts": [{"name": name, "slots": 1} for name in NODES],
    "interface": "eth0",
    "environment": {"OMP_NUM_THREADS": 1, "NOTE": "it's $(touch executed) %h"},
    "timeouts": {"end_seconds": 30, "connect_seconds": 5},
}
LAUNCH = [sys.executable, "-m", "dsllm", "launch", "tiny.yaml", EXACT, "--cluster", "cluster.yaml"]


@pytest.fixture
def folder(folder):
    """The job's folder with a cluster's file for the two nodes, and one for SLURM."""
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    slurm = {"nodes": 2, "tasks_per_node": 1, "gres": "gpu:1", "time_limit": 10}
    (folder / "slurm.yaml").write_text(yaml.safe_dump({"slurm": slurm, "environment": CLUSTER["environment"]}))
    return folder


def marked() -> list[psutil.Process]:
    """Processes of any job of dsllm launch, on all hosts."""
    found = []
    for process in psutil.process_iter():
        try:
            if JOB_VARIABLE in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


def same_as(folder, reference) -> None:
    assert losses(folder) == losses(reference) and fingerprint(folder) == fingerprint(reference)
    assert status(folder)["state"] == "finished" and not list(folder.rglob("executed"))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_hosts_train_as_one(hosts, reference, folder, launcher):
    job = launch(hosts.login.command([*LAUNCH, "--with", launcher], folder), folder)
    assert job.wait() == 0, job.output()
    assert f"2 ranks on cpu (started by {launcher}" in job.output()
    same_as(folder, reference)
    seconds_until_gone(folder, 10)


def test_a_stop_saves_on_both_hosts(hosts, folder):
    job = launch(hosts.login.command([*LAUNCH, *ENDLESS], folder), folder)
    job.wait_for_step(5)
    job.send(signal.SIGTERM)
    assert job.wait(60) == 75, job.output()
    assert status(folder)["state"] == "interrupted"
    seconds_until_gone(folder, 1)


def test_killed_itself_it_lets_both_hosts_save(hosts, folder):
    job = launch(hosts.login.command([*LAUNCH, *ENDLESS], folder), folder)
    job.wait_for_step(5)
    job.send(signal.SIGKILL)
    job.wait()
    seconds_until_gone(folder, 60)
    assert status(folder)["state"] == "interrupted"


def test_one_jobs_stop_leaves_the_other_job_of_the_hosts_alone(hosts, folder):
    """DeepSpeed's own stop command, `pkill -f`, ends both."""
    first = launch(hosts.login.command([*LAUNCH, *ENDLESS], folder), folder)
    first.wait_for_step(5)
    other = [*LAUNCH, *ENDLESS, "run.directory=runs/other"]
    with (folder / "other.log").open("w") as log:
        second = psutil.Popen(hosts.login.command(other, folder), stdout=log, stderr=log, start_new_session=True)
    while len(marked()) < 2 * 2 * 4:  # on each host, for each job: our watch, deepspeed, launch.py, the rank
        assert second.poll() is None and first.process.poll() is None
    second.terminate()
    assert second.wait(60) in (75, 128 + signal.SIGTERM), (folder / "other.log").read_text()
    step = status(folder).get("step", 0)
    first.wait_for_step(step + 10)
    first.send(signal.SIGTERM)
    assert first.wait(60) == 75, first.output()
    seconds_until_gone(folder, 1)


def test_a_lost_host_ends_the_job_in_bounded_time(hosts, folder):
    seconds = 24  # longer than the ranks are apart at the start, on a busy machine too
    words = [*LAUNCH, *ENDLESS, f"train.timeout_minutes={seconds / 60}"]
    job = launch(hosts.login.command(words, folder), folder)
    job.wait_for_step(5)
    hosts.cut("n2")
    try:
        # ssh gives the host up after 3 x 5 s, the ranks each other after their time-out
        assert job.wait(seconds + 45) == 1, job.output()
        assert "rank 0 of 2 lost another rank" in job.output() and status(folder)["state"] == "failed"
        seconds_until_gone(folder, 30)  # on the lost host, too
    finally:
        hosts.join("n2")


def test_an_unknown_host_is_reported_and_nothing_is_left(hosts, folder):
    (folder / "cluster.yaml").write_text(
        yaml.safe_dump({**CLUSTER, "hosts": [{"name": "n1", "slots": 1}, {"name": "n9", "slots": 1}]})
    )
    job = launch(hosts.login.command(LAUNCH, folder), folder)
    assert job.wait(90) not in (0, 75), job.output()
    assert "n9: ssh: Could not resolve hostname n9" in job.output()
    seconds_until_gone(folder, 1)


@pytest.mark.parametrize("budget", [(), ENDLESS], ids=["train", "interrupt"])
def test_slurm_trains_and_stops_as_one(slurm, reference, folder, budget):
    words = [sys.executable, "-m", "dsllm", "launch", "tiny.yaml", EXACT, "--cluster", "slurm.yaml", *budget]
    job = launch(slurm.hosts.login.command(words, folder), folder)
    if budget:
        job.wait_for_step(5)
        job.send(signal.SIGINT)
    assert job.wait() == (75 if budget else 0), job.output()
    if not budget:
        same_as(folder, reference)
        assert "2 ranks on cpu (started by srun" in job.output()
    seconds_until_gone(folder, 15)
    assert slurm.run("squeue", "--noheader") == ""  # not in the queue again
