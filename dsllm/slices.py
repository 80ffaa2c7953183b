"""A piece of one parameter and its optimizer state: what the engine yields and takes back, and a checkpoint stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
"""Key of the fp32 weights in `ParameterSlice.tensors` and in `StateReader.read`."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a parameter: [start, stop) in each of its dimensions. Tensor parallelism cuts boxes."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size in each dimension."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def num_elements(self) -> int:
        """Elements in it; 1 for a scalar."""
        return math.prod(self.shape)


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is the whole parameter."""
    return Box((0,) * len(shape), tuple(shape))


@dataclass(frozen=True, slots=True)
class Region:
    """The elements [start, stop) of a box, flattened in row-major order. ZeRO cuts flat ranges."""

    box: Box
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The elements of the region in a whole parameter, 1-d; a view where the box is the whole parameter."""
        inside = tuple(slice(low, high) for low, high in zip(self.box.start, self.box.stop, strict=True))
        return parameter[inside].reshape(-1)[self.start : self.stop]


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """A region of one parameter, with everything that belongs to it."""

    name: str
    """Global name of the parameter."""
    shape: tuple[int, ...]
    """Global shape of the parameter."""
    region: Region
    tensors: Mapping[str, torch.Tensor]
    """1-d fp32 tensors with one number per element of the region: under WEIGHTS the weights (the master weights where the
    layers see 16 bits), and the optimizer's tensors by the optimizer's names. Frozen parameters have weights only."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """The optimizer's numbers for the whole parameter, such as Adam's step."""
    expert: int | None = None
    """Global number of the expert that the parameter belongs to."""
    trainable: bool = True


class StateReader(Protocol):
    """Where the engine reads its state from: a checkpoint, a Hugging Face folder, or the initial values."""

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """The fp32 values of a region of the parameter `name`, 1-d.

        Args:
            key: one of `keys`
        """
        ...

    def keys(self, name: str) -> tuple[str, ...]:
        """What there is of a parameter: WEIGHTS, and the optimizer's tensors unless it starts anew."""
        ...

    def scalars(self, name: str) -> Mapping[str, float]:
        """The optimizer's numbers for the parameter; empty where it starts anew."""
        ...
