"""The layout of a job: its mesh of ranks, their hosts, the device and the precision."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsllm.config.train import Precision
from dsllm.errors import LaunchError
from dsllm.mesh import Mesh

_MOST_SHOWN = 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the machines add to a run. The same on every rank: made from what all ranks report, see `ranks_by_node`."""

    mesh: Mesh
    device: str
    """"cpu" or "cuda"."""
    precision: Precision
    """The run's precision, with auto resolved."""
    ranks_by_node: tuple[int, ...] | None = ()
    """Number of ranks on each host, in the order of the ranks. () (default): all ranks are on one host. None: not known
    before the ranks meet, so rules about hosts are not checked yet."""

    def __post_init__(self) -> None:
        ranks, hosts = self.mesh.world_size, self.ranks_by_node
        assert not hosts or sum(hosts) == ranks, f"the hosts have {hosts} ranks, but the mesh has {ranks}"

    @property
    def data_size(self) -> int:
        """Data-parallel ranks: they divide the global batch and, with ZeRO, the model states among them."""
        return self.mesh.data

    @property
    def num_nodes(self) -> int | None:
        """Number of hosts; None where they are not known."""
        return None if self.ranks_by_node is None else len(self.ranks_by_node) or 1

    @property
    def ranks_per_node(self) -> int | None:
        """Number of ranks on every host; None where the hosts differ or are not known."""
        if self.ranks_by_node is None:
            return None
        sizes = set(self.ranks_by_node or (self.mesh.world_size,))
        return sizes.pop() if len(sizes) == 1 else None


def ranks_by_node(local: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Number of ranks on each host.

    Args:
        local: local rank and local size as every rank reports them, in the order of the ranks.
    Raises:
        LaunchError: the reports do not fit together, for example because a variable of the launcher is wrong on one host.
    """
    hosts = tuple(size for local_rank, size in local if local_rank == 0)
    expected = sorted((rank, size) for size in hosts for rank in range(size))
    if sorted(local) != expected:
        shown = ", ".join(f"{local_rank} of {size}" for local_rank, size in local[:_MOST_SHOWN])
        raise LaunchError(
            f"the {len(local)} ranks do not divide into hosts: as local ranks they report {shown}"
            f"{', ...' if len(local) > _MOST_SHOWN else ''}. Give each process the LOCAL_RANK and LOCAL_WORLD_SIZE of its host"
        )
    return hosts
