"""deepspeed --hostfile over pdsh and ssh, as it stands: two hosts train as one machine does, and a lost host ends the job."""

import pytest

from tests.cluster.hosts import NODES
from tests.helpers.launched import BIN, ENDLESS, ENTRY, EXACT, fingerprint, launch, losses, seconds_until_gone, status

pytestmark = pytest.mark.long

DEEPSPEED = [str(BIN / "deepspeed"), "--hostfile", "hosts", ENTRY, "--config", "tiny.yaml", EXACT]


@pytest.fixture
def folder(folder):
    """The job's folder with the hostfile of the two nodes."""
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NODES))
    return folder


def test_two_hosts_train_as_one(hosts, reference, folder):
    job = launch(hosts.login.command(DEEPSPEED, folder), folder)
    assert job.wait() == 0, job.output()
    assert "2 ranks on cpu (started by deepspeed" in job.output()
    assert losses(folder) == losses(reference) and fingerprint(folder) == fingerprint(reference)
    assert status(folder)["state"] == "finished"
    seconds_until_gone(folder, 10)


def test_a_host_that_is_cut_off_ends_the_job(hosts, folder):
    seconds = 24  # longer than the ranks are apart at the start, on a busy machine too
    job = launch(hosts.login.command([*DEEPSPEED, *ENDLESS, f"train.timeout_minutes={seconds / 60}"], folder), folder)
    job.wait_for_step(5)
    hosts.cut("n2")
    try:
        # ssh gives the host up after 15 s, the ranks each other after their time-out; launchers look once a second, and a
        # busy machine takes its time
        assert job.wait(seconds + 45) != 0
        assert "error: rank 0 of 2 lost another rank" in job.output() and "Timed out waiting" in job.output()
        assert "n2: ssh exited with exit code 255" in job.output() and status(folder)["state"] == "failed"
        seconds_until_gone(folder, 30)  # on the lost host, too
    finally:
        hosts.join("n2")
