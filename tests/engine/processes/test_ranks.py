"""A process finds its rank from whichever launcher started it, and refuses what contradicts itself."""

import subprocess
import sys

import pytest

from dsllm.engine.processes.ranks import discover_ranks, is_loopback, own_address
from dsllm.errors import LaunchError

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "123", "MASTER_ADDR": "a",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7",
}  # fmt: skip


def test_plain_python_is_a_job_of_one():
    ranks = discover_ranks({})
    assert (ranks.rank, ranks.world_size, ranks.launcher) == (0, 1, "python")


@pytest.mark.parametrize(("launcher", "environment"), [("torchrun", TORCHRUN), ("srun", SRUN), ("mpirun", MPIRUN)])
def test_launchers(launcher, environment):
    ranks = discover_ranks(environment)
    assert ranks.launcher == launcher and ranks.master_address == "a"
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_size) == (3, 1, 4, 2)


def test_two_slurm_jobs_on_one_node_use_two_ports():
    ports = {discover_ranks({**SRUN, "SLURM_JOB_ID": job}).master_port for job in ("123", "124")}
    assert len(ports) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": "4"}, "rank 4 is not within a world of 4"),
        ({"LOCAL_RANK": "2"}, "local rank 2 is not within the 2 processes of this host"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four' is not a number"),
    ],
)
def test_contradictions_are_refused(change, says):
    with pytest.raises(LaunchError, match=says):
        discover_ranks({**TORCHRUN, **change})


def test_srun_without_a_master():
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        discover_ranks({k: v for k, v in SRUN.items() if k != "MASTER_ADDR"})


def test_half_an_environment_is_refused():
    with pytest.raises(LaunchError, match="LOCAL_RANK is not set"):
        discover_ranks({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("addresses", "own"),
    [
        (["127.0.0.1", "10.0.0.7"], "10.0.0.7"),
        (["127.0.0.1"], None),
        (["127.0.0.1", "10.0.0.7", "192.168.0.7"], None),  # only the user knows which network the hosts share
    ],
)
@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_name_that_means_this_machine_itself_is_no_address_for_others(addresses, own, host):
    """Debian gives a host's own name the address 127.0.1.1."""
    assert own_address(host, addresses) == own
    assert own_address("10.1.1.1", addresses) == "10.1.1.1"


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.0.1.1", "localhost", "::1"]))
    assert not any(map(is_loopback, ["10.0.0.1", "node1", "fe80::1"]))


def test_a_missing_hostfile_of_the_launcher_is_found(tmp_path):
    """The runner's own process is the parent here, as it is of every rank that it starts on its own machine."""
    runner = tmp_path / "deepspeed"
    child = "from dsllm.engine.processes.ranks import discover_ranks, is_loopback, own_address; discover_ranks()"
    runner.write_text(
        f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)\n"
    )
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CROSS_SIZE": "1", "PYTHONPATH": ":".join(sys.path)}
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    for name, code in (("hosts", 0), ("absent", 1)):
        command = [sys.executable, str(runner), "--hostfile", name, "pretrain.py"]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "--hostfile absent: no such file; deepspeed would run the job on this machine alone" in done.stderr
