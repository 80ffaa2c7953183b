"""mpirun starts a script that becomes the rank: words, variables and rank 0's address reach it unchanged."""

import dataclasses
import subprocess

import pytest

from dsllm.config.cluster import ClusterConfig, MpiConfig
from dsllm.errors import LaunchError
from dsllm.launch.mpi import mpi_launch, mpirun_words, refuse_other_mpi
from tests.launch.jobs import HOSTILE, HOSTS, make_job, record, recording_cluster


def test_a_rank_gets_its_words_and_the_address_of_rank_0(tmp_path):
    job = make_job(tmp_path)
    launch = mpi_launch(job, recording_cluster(tmp_path, hosts=HOSTS, launcher="mpi"))
    for path, text in launch.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["bash", job.folder / "rank.sh", "0"], check=True)
    assert tuple(record(job)["argv"]) == ("-u", "-m", "dsllm", "train", *HOSTILE)
    assert "env MASTER_ADDR=n1 MASTER_PORT=2" in (job.folder / "rank.sh").read_text()


def test_mpirun_gets_ranks_hosts_and_network(tmp_path):
    cluster = recording_cluster(tmp_path, hosts=HOSTS, launcher="mpi", interface="ib0")
    words = " ".join(mpirun_words(cluster, tmp_path / "hosts"))
    assert words.startswith(f"-np 2 --hostfile {tmp_path}/hosts ") and words.count("if_include ib0") == 2
    local = dataclasses.replace(cluster, hosts=(), slots=3, interface=None)
    assert mpirun_words(local, tmp_path / "hosts") == ["-np", "3", "--oversubscribe"]


@pytest.mark.parametrize(
    ("version", "works"),
    [
        ("mpirun (Open MPI) 4.1.4", True),
        ("mpirun (Open MPI) 5.0.11", True),
        ("mpirun.real (OpenRTE) 4.1.2", True),
        ("HYDRA build details:", False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.19.0 Build 20260929", False),
    ],
)
def test_only_open_mpi_is_started(tmp_path, version, works):
    """What `--version` of each prints first."""
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/bash\necho '{version}'\n")
    program.chmod(0o755)
    cluster = ClusterConfig(launcher="mpi", slots=2, mpi=MpiConfig(program=str(program)))
    if works:
        refuse_other_mpi(cluster)
    else:
        with pytest.raises(LaunchError, match="is not Open MPI's"):
            refuse_other_mpi(cluster)
        refuse_other_mpi(dataclasses.replace(cluster, modules=("openmpi",)))  # it is on the PATH only after that
    with pytest.raises(LaunchError, match="nowhere: cannot be started here: No such file"):
        refuse_other_mpi(dataclasses.replace(cluster, mpi=MpiConfig(program="/nowhere")))
