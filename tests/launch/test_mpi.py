"""mpirun starts a script that becomes the rank: words, variables and rank 0's address reach it unchanged."""

import dataclasses
import subprocess

from dsllm.launch.mpi import mpi_launch, mpirun_words
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
