"""Bytes that the ranks of a run communicate in one optimizer step, by formula."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsllm.config.precision import parameter_bits
from dsllm.config.train import Precision
from dsllm.parameters import ParameterTable

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number, by the names that the DeepSpeed JSON uses."""


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes that every rank hands to collectives in one optimizer step.

    By convention the size of a collective is that of its larger side: what an all-reduce reduces, what a reduce-scatter
    takes and what an all-gather returns. Norms, losses and flags, a few bytes per bucket, are left out.
    """

    all_reduce: int = 0
    reduce_scatter: int = 0
    gather: int = 0
    """Weights that the ranks get from each other: by an all-gather, or by broadcasts from every rank of its part."""

    @property
    def handed(self) -> int:
        """All kinds together."""
        return self.all_reduce + self.reduce_scatter + self.gather

    def on_wire(self, data_parallel_size: int) -> int:
        """Bytes that each rank sends, and receives, with ring algorithms.

        A reduce-scatter or an all-gather sends (W - 1) / W of its size; an all-reduce is one of each (Patarasuk and
        Yuan 2009). Broadcasts of all parts by their owners send as much as an all-gather, averaged over the ranks.
        """
        once = 2 * self.all_reduce + self.reduce_scatter + self.gather
        return once * (data_parallel_size - 1) // data_parallel_size


def communication_of_step(table: ParameterTable, final: Mapping[str, Any], precision: Precision) -> Communication:
    """What one optimizer step of a run communicates.

    Args:
        final: the final DeepSpeed config
        precision: resolved, not auto
    """
    zero, weight_width = final["zero_optimization"], parameter_bits(precision) // 8
    sizes = [parameter.num_elements for parameter in table]
    gathered = sum(sizes)
    if zero["stage"] == 3:
        gathered -= sum(size for size in sizes if size <= zero["stage3_param_persistence_threshold"])
        if gathered > max(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]):
            gathered *= 2  # released after the forward pass, and gathered again for the backward pass
    return communication_bytes(
        sum(sizes),
        zero["stage"],
        final["gradient_accumulation_steps"],
        gradient_width=WIDTHS.get(final.get("communication_data_type", ""), weight_width),
        weight_width=weight_width,
        gathered_per_micro_batch=gathered,
    )


def communication_bytes(
    num_parameters: int,
    zero_stage: int,
    accumulation: int,
    gradient_width: int,
    weight_width: int,
    gathered_per_micro_batch: int | None = None,
) -> Communication:
    """Gradients that are reduced and weights that are gathered in one optimizer step, by DeepSpeed 0.19.8's ZeRO.

    Stages 0 and 1 reduce once a step, stages 2 and 3 once in every micro-batch. Stages 1 and 2 gather the updated
    weights once; stage 3 gathers those that are not persistent in every micro-batch. Stages 0 to 2 reduce whole buckets
    by all-reduce, stage 3 by reduce-scatter. (`reduce_scatter: true` at stages 1 and 2 calls all-reduce all the same.)

    Args:
        accumulation: micro-batches of a rank per step
        gradient_width: bytes per gradient, as communicated
        weight_width: bytes per weight, as the layers see it
        gathered_per_micro_batch: ZeRO-3: elements; None (default): all of them once. The rest, which
            `stage3_param_persistence_threshold` keeps whole, is gathered once a step. A model larger than both
            `stage3_max_live_parameters` and `stage3_max_reuse_distance` is gathered up to twice in every micro-batch
    """
    gradients, weights = num_parameters * gradient_width, num_parameters * weight_width
    if zero_stage == 0:
        return Communication(all_reduce=gradients)
    if zero_stage < 3:
        return Communication(all_reduce=gradients * (accumulation if zero_stage == 2 else 1), gather=weights)
    gathered = num_parameters if gathered_per_micro_batch is None else gathered_per_micro_batch
    once = max(0, num_parameters - gathered)
    return Communication(
        reduce_scatter=accumulation * gradients, gather=(accumulation * gathered + once) * weight_width
    )
