"""Chooses the launcher of a cluster and makes the files and commands that start a job with it."""

from dsllm.config.cluster import ClusterConfig
from dsllm.launch.hosts import local_launch, ssh_launch
from dsllm.launch.job import Job, Launch
from dsllm.launch.mpi import mpi_launch
from dsllm.launch.slurm import slurm_launch


def make_launch(job: Job, cluster: ClusterConfig) -> Launch:
    """The files and commands that start the job; writes and runs nothing."""
    launcher = cluster.chosen_launcher
    if launcher == "slurm":
        return slurm_launch(job, cluster)
    if launcher == "mpi":
        return mpi_launch(job, cluster)
    if launcher == "local" or not cluster.hosts:
        return local_launch(job, cluster, with_torchrun=launcher == "torchrun")
    return ssh_launch(job, cluster, with_torchrun=launcher == "torchrun")
