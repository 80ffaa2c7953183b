"""Counts what a step really does, operator by operator: FLOPs of matrix products, and bytes given to collectives."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten
_MATRIX_PRODUCTS = (_aten.mm, _aten.addmm)
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
"""In-place products, and the form of them that torch's table of formulas has."""
_CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward

_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast": "broadcast",
    "alltoall": "all_to_all",
}
"""Beginnings of torch's names inside c10d."""


class Counting(TorchDispatchMode):
    """Counts every operator that this process runs in the block; it changes no result.

    Compiled code is opaque to it, and the step is slower. FLOPs are counted by torch's own formulas
    (torch.utils.flop_counter): two for each multiplication and addition of a matrix product; what is not a product of
    two matrices (the norms' sums too, which torch writes as one with a vector) is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameter_flops = 0
        """Products with a parameter: the projections and the head, forward and backward."""
        self.attention_flops = 0
        """Products between activations: the attention."""
        self.communication_bytes: Counter[str] = Counter()
        """By kind of collective: the size of its largest side, which all ranks together send to or receive from each."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = _IN_PLACE.get(func.overloadpacket, func.overloadpacket)
        if func.namespace == "c10d":
            self._count_collective(func, args)
        elif operator in _MATRIX_PRODUCTS:
            if 1 not in result.shape:
                self.parameter_flops += flop_registry[operator](*args, **(kwargs or {}), out_val=result)
        elif operator is _CPU_ATTENTION:  # torch's table has only the GPUs' kernels
            self.attention_flops += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif operator is _CPU_ATTENTION_BACKWARD:
            grad, query, key, value = (t.shape for t in args[:4])
            self.attention_flops += sdpa_backward_flop_count(grad, query, key, value)
        elif operator in flop_registry:
            self.attention_flops += flop_registry[operator](*args, **(kwargs or {}), out_val=result)
        return result

    def _count_collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__.lstrip("_")
        kind = next((kind for start, kind in _COLLECTIVES.items() if name.startswith(start)), None)
        if kind is not None:
            self.communication_bytes[kind] += max(sum(t.nbytes for t in _tensors(arg)) for arg in args)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
