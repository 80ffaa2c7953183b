"""A piece of one parameter and its optimizer state: what the engine yields and takes back, and a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

MASTER = "master"
"""Key of the fp32 weights in `ParameterSlice.tensors` and in `StateReader.read`."""


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """A flat range of one parameter, with everything that belongs to it."""

    name: str
    """Global name of the parameter."""
    shape: tuple[int, ...]
    """Global shape of the parameter. Without tensor parallelism the range runs over the whole of it."""
    start: int
    """First element of the range, counted in the flattened parameter."""
    tensors: Mapping[str, torch.Tensor]
    """1-d fp32 tensors of equal length: the master weights, and the optimizer's moments by the optimizer's names."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """The optimizer's numbers for this parameter, such as Adam's step."""

    @property
    def stop(self) -> int:
        """One past the last element of the range."""
        return self.start + self.tensors[MASTER].numel()


class StateReader(Protocol):
    """Where the engine reads its state from: a checkpoint, a Hugging Face folder, or the initial values."""

    def read(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """The fp32 values [start, stop) of the flattened parameter `name`, 1-d."""
        ...

    def keys(self, name: str) -> tuple[str, ...]:
        """What there is of a parameter: MASTER, and the optimizer's moments if any."""
        ...

    def scalars(self, name: str) -> Mapping[str, float]:
        """The optimizer's numbers for the parameter; empty where it starts anew."""
        ...
