"""Each launcher gets its own files and commands, and nothing is written or run by making them."""

import pytest

from dsllm.config.cluster import ClusterConfig, SlurmConfig
from dsllm.launch.commands import make_launch
from tests.launch.jobs import HOSTS, make_job

CLUSTERS = {
    "local": (ClusterConfig(slots=2), ["localhost"], {"node.sh"}),
    "torchrun": (ClusterConfig(slots=2, launcher="torchrun"), ["localhost"], {"node.sh"}),
    "deepspeed over ssh": (ClusterConfig(hosts=HOSTS), ["n1", "n2"], {"hosts", "node.sh"}),
    "torchrun over ssh": (ClusterConfig(hosts=HOSTS, launcher="torchrun"), ["n1", "n2"], {"hosts", "node.sh"}),
    "mpi": (ClusterConfig(slots=2, launcher="mpi"), ["localhost"], {"node.sh", "rank.sh"}),
    "mpi on hosts": (
        ClusterConfig(hosts=HOSTS, launcher="mpi"),
        ["localhost"],
        {"hosts", "node.sh", "rank.sh", "sweep.sh"},
    ),
    "slurm": (ClusterConfig(slurm=SlurmConfig()), ["sbatch"], {"job.sbatch"}),
    "slurm over ssh": (ClusterConfig(slurm=SlurmConfig(start="ssh")), ["sbatch"], {"job.sbatch", "cluster.yaml"}),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_launcher_has_its_files_and_commands(tmp_path, name):
    cluster, hosts, files = CLUSTERS[name]
    job = make_job(tmp_path)
    launch = make_launch(job, cluster)
    assert list(launch.commands) == hosts
    assert {path.name for path in launch.files} == files and {path.parent for path in launch.files} == {job.folder}
    assert not job.folder.exists()
    # only mpirun leaves hosts without a watcher
    assert list(launch.sweeps) == (["n1", "n2"] if name == "mpi on hosts" else [])
