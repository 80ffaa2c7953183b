"""From a run and a cluster to the plan for its launcher."""

from dsllm.config.cluster import ClusterConfig
from dsllm.launch.hosts import plan_here, plan_on_hosts
from dsllm.launch.job import Job, Plan
from dsllm.launch.mpi import plan_mpi
from dsllm.launch.slurm import plan_slurm


def make_plan(job: Job, cluster: ClusterConfig) -> Plan:
    """The files and commands that start the job; nothing is written or run."""
    launcher = cluster.chosen_launcher
    if launcher == "slurm":
        return plan_slurm(job, cluster)
    if launcher == "mpi":
        return plan_mpi(job, cluster)
    if launcher == "local" or not cluster.hosts:
        return plan_here(job, cluster, with_torchrun=launcher == "torchrun")
    return plan_on_hosts(job, cluster, with_torchrun=launcher == "torchrun")
