"""Bytes of a model's weights, gradients and optimizer state: on a rank at each moment of a step, and in a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsllm.config.precision import has_fp32_parameters
from dsllm.config.train import Precision
from dsllm.parameters import ParameterTable

ADAM_STATE_TENSORS = 2
"""The first and the second moment, one number of each per parameter."""


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes per rank of weights, gradients, master weights and Adam's moments, from the second optimizer step on."""

    after_init: int
    """Before the first step: no moments yet, and no gradients where they exist during a step only."""
    while_accumulating: int
    """After the backward pass of a micro-batch that is not the step's last; without accumulation as after_backward."""
    after_backward: int
    """After the last backward pass, before the update."""
    after_step: int
    """Between steps."""

    @property
    def most(self) -> int:
        """The largest of them."""
        return max(self.after_init, self.while_accumulating, self.after_backward, self.after_step)


_Sums = Literal["fp32", "bf16 -> fp32", "fp16 -> fp32", "16 bits"]
"""fp32: fp32 parameters. The others: 16-bit parameters, whose gradients add up in fp32 or in 16 bits."""

_Moments = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
"""Bytes per parameter at the four moments of `ModelStates`, each as (on every rank, divided over the ranks)."""

# Weights take 4 bytes (fp32) or 2, masters 4, Adam's moments 8, a gradient as much as its weight, its sum 4 or 2.
# In fp32 the weights are the masters: wholly at stages 0 and 3, and a rank's part of them at stages 1 and 2.
_STATES: Mapping[int, Mapping[_Sums, _Moments]] = {
    # Everything on every rank. Gradients add up in the parameters' type.
    0: {
        "fp32": ((4, 0), (16, 0), (16, 0), (12, 0)),
        "bf16 -> fp32": ((6, 0), (16, 0), (16, 0), (14, 0)),
        "fp16 -> fp32": ((6, 0), (16, 0), (16, 0), (14, 0)),
        "16 bits": ((6, 0), (16, 0), (16, 0), (14, 0)),
    },
    # Masters and moments are divided. While accumulating every rank has whole gradients, after the last backward pass
    # its part of their sum.
    1: {
        "fp32": ((4, 0), (8, 8), (4, 12), (4, 8)),
        "bf16 -> fp32": ((6, 4), (8, 12), (8, 12), (6, 12)),  # BF16_Optimizer: a whole fp32 sum on every rank, always
        "fp16 -> fp32": ((2, 4), (6, 12), (6, 12), (2, 12)),  # the whole fp32 sum lives until the step is over
        "16 bits": ((2, 4), (4, 12), (2, 14), (2, 12)),
    },
    # The sum of the gradients is divided too, from the first backward pass on.
    2: {
        "fp32": ((4, 0), (4, 12), (4, 12), (4, 8)),
        "bf16 -> fp32": ((2, 4), (2, 16), (2, 16), (2, 12)),
        "fp16 -> fp32": ((2, 4), (2, 16), (2, 16), (2, 12)),
        "16 bits": ((2, 4), (2, 14), (2, 14), (2, 12)),
    },
    # Everything is divided. The sum of the gradients is allocated at the start and stays.
    3: {
        "fp32": ((0, 8), (0, 16), (0, 16), (0, 16)),
        "bf16 -> fp32": ((0, 10), (0, 18), (0, 18), (0, 18)),
        "fp16 -> fp32": ((0, 10), (0, 18), (0, 18), (0, 18)),
        "16 bits": ((0, 8), (0, 16), (0, 16), (0, 16)),
    },
}


def model_states(
    num_parameters: int,
    zero_stage: Literal[0, 1, 2, 3],
    precision: Precision,
    data_parallel_size: int,
    fp32_gradients: bool = True,
    accumulation: int = 1,
) -> ModelStates:
    """Model states as DeepSpeed 0.19.8 holds them at each moment of a step.

    Buffers for communication, the activations and what a backward pass needs in between come on top.

    Args:
        precision: resolved, not auto
        fp32_gradients: gradients add up in fp32 where the parameters are 16-bit
        accumulation: micro-batches per step
    """
    start, accumulating, backward, step = (
        whole * num_parameters + -(-divided * num_parameters // data_parallel_size)
        for whole, divided in _STATES[zero_stage][_sums(precision, fp32_gradients)]
    )
    return ModelStates(
        after_init=start,
        while_accumulating=backward if accumulation == 1 else accumulating,
        after_backward=backward,
        after_step=step,
    )


def checkpoint_bytes(table: ParameterTable, num_state_tensors: int = ADAM_STATE_TENSORS) -> int:
    """Bytes of a checkpoint's tensors: fp32 weights, and of what is trained the optimizer's state.

    Args:
        num_state_tensors: fp32 tensors that the optimizer keeps per parameter
    """
    return sum(4 * p.num_elements * (1 + (num_state_tensors if p.trainable else 0)) for p in table)


def _sums(precision: Precision, fp32_gradients: bool) -> _Sums:
    if has_fp32_parameters(precision):
        return "fp32"
    if not fp32_gradients:
        return "16 bits"
    return "bf16 -> fp32" if precision == "bf16" else "fp16 -> fp32"
