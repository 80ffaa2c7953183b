"""The SLURM scripts in launch/slurm, made by the same code as those of `dsllm launch`; `make docs` writes them."""

import dataclasses

from dsllm.config.cluster import ClusterConfig, ContainerConfig, SlurmConfig
from dsllm.launch.slurm import batch_script

_ONE_NODE = SlurmConfig(nodes=1, tasks_per_node=1, gres="gpu:1", time_limit="1-00:00:00")
_TWO_NODES = dataclasses.replace(_ONE_NODE, nodes=2)
_NOT_TRIED = "NOT VERIFIED HERE: written from the documentation of {}, not run by us."


def slurm_templates() -> dict[str, str]:
    """The names and contents of the files in launch/slurm."""
    pyxis = ContainerConfig(image="/path/to/dsllm.sqsh", runtime="pyxis", mounts=("/path/to/shared",))
    apptainer = ContainerConfig(image="/path/to/dsllm.sif", runtime="apptainer", mounts=("/path/to/shared",))
    return {
        "single_node.sbatch": _template(ClusterConfig(slurm=_ONE_NODE), "One host."),
        "multi_node.sbatch": _template(
            ClusterConfig(slurm=_TWO_NODES), "Several hosts, one task per rank; no ssh between the hosts."
        ),
        "multi_node_ssh.sbatch": _template(
            ClusterConfig(slurm=dataclasses.replace(_TWO_NODES, start="ssh")),
            "Several hosts that reach each other by ssh: DeepSpeed's launcher on each of them.",
        ),
        "multi_node_pyxis.sbatch": _template(
            ClusterConfig(slurm=_TWO_NODES, container=pyxis),
            "Several hosts, ranks in an enroot image.\n# " + _NOT_TRIED.format("enroot and pyxis"),
        ),
        "multi_node_apptainer.sbatch": _template(
            ClusterConfig(slurm=_TWO_NODES, container=apptainer),
            "Several hosts, ranks in an apptainer image.\n# " + _NOT_TRIED.format("apptainer"),
        ),
    }


def _template(cluster: ClusterConfig, about: str) -> str:
    lines = [
        about,
        "",
        "    sbatch [options] FILE RUN.yaml [key=value ...]",
        "",
        "One task per GPU: raise --ntasks-per-node and --gres together, here or on sbatch's command line, which overrides",
        "these lines; add --partition, --account and --qos as your cluster needs them. All paths must be the same on every",
        "host. Before the time limit the ranks save, and the job starts again; code 0 means that the run has finished.",
    ]
    return batch_script(cluster, None, about="\n".join(f"# {line}".rstrip() for line in lines))
