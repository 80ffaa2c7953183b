"""The parallel branch of a run: how the ranks divide the model and the data among them."""

from dataclasses import dataclass

from dsllm.config.fields import STRICT_FIELDS, changeable


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh. Data parallelism takes all ranks that these leave. May change when a run is resumed."""

    __pydantic_config__ = STRICT_FIELDS

    tensor: int = changeable(1)
    """Ranks that share each matrix of a layer."""
    pipeline: int = changeable(1)
    """Stages that the layers are divided into."""
    sequence: int = changeable(1)
    """Ranks that share each sequence."""
    expert: int = changeable(1)
    """Ranks that share the experts of a layer; they are data-parallel ranks for everything else."""
