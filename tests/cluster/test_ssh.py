"""deepspeed --hostfile over pdsh and ssh, as it stands: two hosts train as one machine does, and a lost host ends the job."""

import pytest

from tests.cluster.hosts import NODES
from tests.helpers.launched import BIN, ENTRY, EXACT, fingerprint, launch, losses, seconds_until_gone, status

pytestmark = pytest.mark.slow

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
