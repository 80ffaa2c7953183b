"""A skipped step with the optimizer offloaded: drop the gradients that caused it, or all later steps are skipped too."""

from typing import Any


def drop_skipped_gradients(optimizer: Any) -> None:
    """Fix ZeRO-1 and 2 with an offloaded optimizer and 16-bit weights.

    When a gradient is not finite, DeepSpeed's `step` returns without clearing the fp32 buffer in which gradients add up
    (it clears it only without offload). The next step's gradients are added to infinity, that step is skipped as well, and
    so on to the end of the run. Found by tests/engine/test_offload.py, deepspeed 0.19.8. `reset_cpu_buffers` is the last
    thing that a step does with gradients, whether it was taken or skipped.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_and_let_go() -> None:
        reset()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
        for group in optimizer.all_grad_tensors:
            optimizer.all_grad_tensors[group] = None

    optimizer.reset_cpu_buffers = reset_and_let_go
