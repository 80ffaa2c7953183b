"""What `dsllm launch` checks of a run on a cluster before it writes or starts anything."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsllm.config.cluster import ClusterConfig
from dsllm.config.paths import presets_directory
from dsllm.config.precision import resolve_precision
from dsllm.config.run import RunConfig
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.errors import ConfigError
from dsllm.launch.hosts import local_slots
from dsllm.mesh import make_mesh


def ranks_of_hosts(cluster: ClusterConfig) -> tuple[int, ...]:
    """Number of ranks on each host of the job."""
    if cluster.chosen_launcher == "slurm" and cluster.slurm:
        return (cluster.slurm.tasks_per_node,) * cluster.slurm.nodes
    if cluster.chosen_launcher == "local" or not cluster.hosts:
        return (local_slots(cluster),)
    return tuple(host.slots for host in cluster.hosts)


def check_ranks(config: RunConfig, given: Mapping[str, Any], cluster: ClusterConfig) -> None:
    """Refuse what every rank would refuse: a batch or a mesh that does not fit the number of ranks, a wrong DeepSpeed JSON.

    The hosts may have GPUs where this machine has none, so a run that works on one kind of device passes.

    Args:
        given: the DeepSpeed JSON that the run names.
    Raises:
        ConfigError: the run cannot work on so many ranks.
    """
    hosts = ranks_of_hosts(cluster)
    mesh = make_mesh(config.parallel, sum(hosts))
    refused: list[ConfigError] = []
    for device in ("cuda", "cpu"):
        try:
            precision = resolve_precision(config.train.precision, device)
            layout = Layout(mesh=mesh, device=device, precision=precision, ranks_by_node=hosts)
            final_config(config, given, layout)
        except ConfigError as error:
            refused.append(error)
        else:
            return
    raise refused[0]


def notes(config: RunConfig, file: Path | None, cluster: ClusterConfig, directory: Path) -> Iterator[str]:
    """What is likely a mistake, but may be meant.

    Args:
        file: the run's YAML file.
        directory: the folder in which the ranks start.
    """
    if cluster.chosen_launcher == "local" or (cluster.chosen_launcher != "slurm" and not cluster.hosts):
        return
    if (
        file
        and cluster.shared_directory
        and not file.resolve().is_relative_to(Path(cluster.shared_directory).resolve())
    ):
        yield (
            f"{file} is outside shared_directory {cluster.shared_directory}: the ranks read it under this path, so every "
            "host must see it there"
        )
    places = [directory, *([file.parent] if file else []), presets_directory()]
    if not any((place / config.deepspeed).is_file() for place in places):
        yield (
            f"deepspeed {config.deepspeed}: is in this working directory, but the ranks start in {directory}: copy it there, "
            "or put it into the folder of the run's file"
        )
    data = directory / (config.data.directory or "")
    if not data.is_dir():
        yield (
            f"data.directory {data} is not there yet: rank 0 would prepare it inside the job, while all other ranks wait; "
            "`dsllm prepare` does it before, on one machine"
        )
