"""Statistics of one step, layer by layer: activations, gradients before clipping, weights and their update, over all ranks."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsllm.engine.build import Engine
from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.state import owned_slices
from dsllm.slices import WEIGHTS


@dataclass
class _Sums:
    """Sums over a layer's output, over this rank's micro-batches."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0


class LayerStatistics:
    """What one step does in each layer. Make one, hand it to `take_step`, then ask it for its `rows`.

    A layer is a block (`layers.0`, ...) or another direct part of the model (`embed`, `norm`, `head`, ...). The parameter
    table says which parameters it has; one that is used twice belongs to its first use.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._layer_of = {row.name: row.layer for row in engine.table}
        self._activations: defaultdict[str, _Sums] = defaultdict(_Sums)
        self._gradient_squares: dict[str, float] = {}
        self._masters: list[Tensor] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Read the layers' outputs during a forward pass; afterwards nothing is left, so recomputation is not read."""
        hooks = [
            module.register_forward_hook(self._reader(name))
            for name, module in _layers(self._engine.module)
            if name != "head"  # it returns losses
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _reader(self, name: str) -> Any:
        @torch.no_grad()
        def read(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sums, wide = self._activations[name], output.detach().float()
            sums.count += wide.numel()
            sums.total += float(wide.sum(dtype=torch.float64))
            sums.squares += float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
            low, high = (float(x) for x in wide.aminmax())
            # a comparison with NaN is always false, so NaN is looked for by name
            sums.largest = math.nan if math.isnan(high + low) else max(sums.largest, -low, high)

        return read

    def before_update(self, loss_scale: float) -> None:
        """Read the whole gradient, one parameter at a time, and keep this rank's masters; a collective call."""
        squares: defaultdict[str, float] = defaultdict(float)
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = deepspeed.utils.safe_get_full_grad(parameter)
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            squares[self._layer_of[name]] += (float(norm) / loss_scale) ** 2
        self._gradient_squares = dict(squares)
        self._masters = [piece.tensors[WEIGHTS].clone() for piece in owned_slices(self._engine)]

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer, in the model's order; the same on all ranks; a collective call, after the step.

        activation_rms, activation_mean, activation_max (of the absolute value): of the layer's output, before the
        update; None where a layer has no output of its own. gradient_norm: of the averaged gradient, unscaled and
        before clipping. weight_norm: after the update; update_ratio: norm of the update / norm of the weights before.
        """
        names = list(dict.fromkeys(self._layer_of.values()))
        weights, updates = self._weights_and_updates(names)
        return [
            {
                "layer": name,
                **activation,
                "gradient_norm": math.sqrt(self._gradient_squares.get(name, 0.0)),
                "weight_norm": math.sqrt(after),
                "update_ratio": math.sqrt(change / before) if before else None,
            }
            for name, activation, (after, before), change in zip(
                names, self._activation_rows(names), weights, updates, strict=True
            )
        ]

    def _activation_rows(self, names: Iterable[str]) -> list[dict[str, float | None]]:
        rows: list[dict[str, float | None]] = []
        every_rank = self._engine.world.gather(dict(self._activations))
        for name in names:
            sums = [activations[name] for activations in every_rank if name in activations]
            count = sum(s.count for s in sums)
            largest = [s.largest for s in sums]
            rows.append(
                {
                    "activation_rms": math.sqrt(sum(s.squares for s in sums) / count) if count else None,
                    "activation_mean": sum(s.total for s in sums) / count if count else None,
                    "activation_max": None
                    if not count
                    else math.nan
                    if any(map(math.isnan, largest))
                    else max(largest),
                }
            )
        return rows

    def _weights_and_updates(self, names: list[str]) -> tuple[list[tuple[float, float]], list[float]]:
        """Sums of squares per layer: (weights after, weights before), and their difference."""
        sums = {name: [0.0, 0.0, 0.0] for name in names}
        for piece, before in zip(owned_slices(self._engine), self._masters, strict=True):
            after = piece.tensors[WEIGHTS]
            for i, tensor in enumerate((after, before, after - before)):
                sums[self._layer_of[piece.name]][i] += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        flat = self._engine.world.sum([value for name in names for value in sums[name]])
        triples = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        return [(t[0], t[1]) for t in triples], [t[2] for t in triples]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in model.named_children():
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in part.named_children())
        else:
            yield name, part
