"""The interface to DeepSpeed's optimizer wrappers: where the state is, and how an update went."""

import abc
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dsllm.config.train import Precision
from dsllm.engine.processes.process_group import World
from dsllm.slices import WEIGHTS

STATE_TENSORS = "state_tensors"
"""Key of an optimizer group: the names of the tensors that its optimizer keeps per parameter."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A flat range of one parameter inside one of the optimizer's own fp32 tensors."""

    name: str
    shape: tuple[int, ...]
    """Global shape of the parameter."""
    start: int
    """First element of the range in the flattened parameter."""
    count: int
    owner: torch.Tensor
    """The fp32 weights that key the optimizer's state, empty while they are on NVMe; of a frozen parameter the weights
    that the layers see."""
    offset: int = 0
    """First element of the range in the owner."""
    group: int | None
    """Number of the optimizer's group; None: a frozen parameter."""
    replicated: bool = False
    """Every data-parallel rank has this piece; if not, this rank alone."""
    swapped: int | None = None
    """ZeRO-3's sub-group, where that is on NVMe between steps."""

    @property
    def inside(self) -> slice:
        """The range in the flattened owner."""
        return slice(self.offset, self.offset + self.count)


@dataclass(frozen=True)
class Outcome:
    """How an update went. The same on all ranks."""

    gradient_norm: float
    """Norm of the averaged gradient before clipping; not finite where the update was skipped."""
    applied: bool
    """False where a gradient was not finite: weights and optimizer state are as before."""


class Wrapper(abc.ABC):
    """One of DeepSpeed's optimizer wrappers. Subclasses are the only code that knows where each keeps its tensors."""

    attributes: ClassVar[tuple[str, ...]]
    """Attributes of the wrapper, most of them private, that the class reads."""

    def __init__(self, engine: Any, world: World):
        """
        Args:
            engine: the DeepSpeedEngine
        """
        self.engine, self.optimizer, self.world = engine, engine.optimizer, world
        self.names: Mapping[int, str] = {id(p): name for name, p in engine.module.named_parameters()}

    @property
    def torch_optimizer(self) -> Any:
        """The optimizer that was handed to DeepSpeed."""
        return self.optimizer.optimizer

    @property
    def missing_attributes(self) -> list[str]:
        """Attributes that this version of DeepSpeed does not have."""
        return [name for name in self.attributes if getattr(self.optimizer, name, None) is None]

    @abc.abstractmethod
    def fix(self, precision: Precision, offloads: bool) -> None:
        """Fix this wrapper's known defects and needless copies. Called once, before weights are loaded."""

    @abc.abstractmethod
    def trainable_pieces(self) -> Iterator[Piece]:
        """The pieces that this rank's optimizer works on; pieces of one owner follow each other."""

    @abc.abstractmethod
    def refresh(self) -> None:
        """Copy the master weights to the weights that the layers see; a collective call."""

    def frozen_pieces(self) -> Iterator[Piece]:
        """The frozen parameters, which have no optimizer state: whole on every rank below ZeRO-3."""
        for name, p in self.engine.module.named_parameters():
            if not p.requires_grad:
                yield Piece(
                    name=name, shape=tuple(p.shape), start=0, count=p.numel(), owner=p, group=None, replicated=True
                )

    def pieces(self) -> Iterator[Piece]:
        """All pieces of this rank."""
        yield from self.trainable_pieces()
        yield from self.frozen_pieces()

    def state_names(self, piece: Piece) -> tuple[str, ...]:
        """Names of the tensors that the optimizer keeps of a piece."""
        return () if piece.group is None else tuple(self.torch_optimizer.param_groups[piece.group][STATE_TENSORS])

    def tensors(self, piece: Piece) -> dict[str, torch.Tensor]:
        """WEIGHTS and those of the optimizer's tensors that exist, each as long as the piece's owner."""
        state = self.torch_optimizer.state.get(piece.owner, {})
        names = [name for name in self.state_names(piece) if name in state]
        return {WEIGHTS: piece.owner.data} | {name: state[name] for name in names}

    @contextlib.contextmanager
    def in_memory(self, piece: Piece) -> Iterator[None]:
        """Make the piece's owner and its state writable for the block."""
        yield

    def forget_state(self) -> None:
        """Let the optimizer start anew."""
        self.torch_optimizer.state.clear()

    def update(self, clipping: float) -> Outcome:
        """Let the optimizer apply the accumulated gradient.

        Args:
            clipping: largest gradient norm; 0: off. DeepSpeed clips by its own config, which says the same
        """
        self.engine.step()
        return Outcome(float(self.engine.get_global_grad_norm()), not self.optimizer.overflow)
