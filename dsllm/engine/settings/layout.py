"""What the machine adds to a run: how many ranks on how many nodes, which device, which precision."""

from dataclasses import dataclass

from dsllm.config.train import Precision


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the machine adds to the run."""

    world_size: int
    """Data-parallel ranks."""
    device: str
    """"cpu" or "cuda"."""
    precision: Precision
    """The run's precision, with auto resolved."""
    num_nodes: int = 1
    """Hosts; each has the same number of ranks."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks on one host."""
        return self.world_size // self.num_nodes
