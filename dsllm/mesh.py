"""The mesh of ranks: the sizes data, tensor, pipeline, sequence and expert, which rank is what, and what cannot be."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from dsllm.config.parallel import ParallelConfig
from dsllm.errors import ConfigError

Axis = Literal["pipeline", "data", "sequence", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""From the slowest to the fastest: neighbouring ranks are tensor-parallel, so that they share a host."""

NOT_YET: tuple[str, ...] = ("tensor", "pipeline", "sequence", "expert")
"""Fields of `parallel` that only 1 is implemented for."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the axes. Their product, without `expert`, is the world size."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    expert: int = 1
    """Divides `data`: the experts of a layer are spread over so many data-parallel ranks."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.tensor * self.pipeline * self.sequence

    def size(self, axis: Axis) -> int:
        """Ranks along one axis."""
        return {"pipeline": self.pipeline, "data": self.data, "sequence": self.sequence, "tensor": self.tensor}[axis]

    def place(self, rank: int, axis: Axis) -> int:
        """Number of a rank along one axis."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        faster = AXES[AXES.index(axis) + 1 :]
        stride = 1
        for name in faster:
            stride *= self.size(name)
        return rank // stride % self.size(axis)

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """All groups of ranks that differ along these axes only, in the order in which every rank must make them."""
        fixed = [axis for axis in AXES if axis not in axes]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            found.setdefault(tuple(self.place(rank, axis) for axis in fixed), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def __str__(self) -> str:
        return " x ".join(f"{axis} {self.size(axis)}" for axis in AXES if self.size(axis) > 1) or "one rank"


def make_mesh(parallel: ParallelConfig, world_size: int) -> Mesh:
    """The mesh of a run on so many ranks: data parallelism takes what the other axes leave.

    Raises:
        ConfigError: every size that is impossible on these ranks, or not implemented, at once.
    """
    problems = list(_problems(parallel, world_size))
    if problems:
        raise ConfigError(problems)
    others = parallel.tensor * parallel.pipeline * parallel.sequence
    return Mesh(
        data=world_size // others,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        expert=parallel.expert,
    )


def _problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "sequence", "expert")}
    assert min(sizes.values()) >= 1, "sizes below 1 are refused with the config's other fields"
    for name in NOT_YET:
        if sizes[name] > 1:
            yield f"parallel.{name}: {sizes[name]}, but this version trains with data parallelism only: set it to 1"
    others = parallel.tensor * parallel.pipeline * parallel.sequence
    if world_size % others:
        yield (
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x sequence {parallel.sequence} = {others} "
            f"does not divide the {world_size} ranks: change the sizes, or start a multiple of {others} ranks"
        )
    elif world_size // others % parallel.expert:
        yield (
            f"parallel.expert: {parallel.expert} does not divide the {world_size // others} data-parallel ranks "
            f"({world_size} ranks / {others})"
        )
