"""mpirun, with the MPI runtime of the extra `mpi` and with the system's: ranks find each other through mpi4py."""

import shutil

import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import LOGIN, NODES
from tests.helpers.launched import (
    BIN,
    ENTRY,
    ENVIRONMENT,
    EXACT,
    fingerprint,
    launch,
    losses,
    seconds_until_gone,
    status,
)

pytestmark = pytest.mark.long

# mpirun refuses root unless it is told twice
AS_ROOT = {**ENVIRONMENT, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
RANK = [str(BIN / "python"), "-u", ENTRY, "--config", "tiny.yaml", EXACT]


def check(folder, reference) -> None:
    assert losses(folder) == losses(reference) and fingerprint(folder) == fingerprint(reference)
    assert status(folder)["state"] == "finished"
    seconds_until_gone(folder, 10)


@pytest.mark.parametrize("mpirun", ["the extra's", "the system's"])
def test_two_ranks_on_one_host(reference, folder, mpirun):
    path = {"the extra's": str(BIN), "the system's": "/usr/local/bin:/usr/bin:/bin"}[mpirun]
    program = shutil.which("mpirun", path=path)
    need([] if program else [f"no mpirun in {path}"])
    job = launch([program, "--oversubscribe", "-np", "2", *RANK], folder, AS_ROOT)
    assert job.wait() == 0, job.output()
    assert "2 ranks on cpu (started by mpirun" in job.output()
    check(folder, reference)


def test_two_hosts(hosts, reference, folder):
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NODES))
    words = ["mpirun", "-np", "2", "--hostfile", "hosts", *RANK]
    job = launch(hosts.hosts[LOGIN].command(words, folder), folder, AS_ROOT)
    assert job.wait() == 0, job.output()
    check(folder, reference)
