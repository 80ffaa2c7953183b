"""fp16's dynamic loss scale: grows after the step that earned it, not in the middle of it."""

from typing import Any


def stay_at_minimum(optimizer: Any) -> None:
    """Let the run decide what happens when the scale is at its minimum: DeepSpeed would end it there, without saying why."""
    scaler = optimizer.loss_scaler
    if scaler.dynamic:
        scaler.raise_error_at_min_scale = False


def grow_after_step(optimizer: Any) -> None:
    """Mend the order in which DeepSpeed's ZeRO optimizers work.

    Their `step` first updates the loss scale and then divides the gradients by it. In the step at which the scale
    doubles, the gradients are so divided by twice what they were multiplied with: the step is taken with half the
    gradient, and clipping passes over gradients of up to twice its limit (stage 3 also reports half the norm). Found by
    the parity table, deepspeed 0.19.8. Here the scale falls at once, as an overflowing step is skipped, and grows when
    the step is over.
    """
    update, step = optimizer._update_scale, optimizer.step

    def fall_only(has_overflow: bool = False) -> None:
        if has_overflow:
            update(True)

    def step_then_grow(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        if not optimizer.overflow:
            update(False)
        return result

    optimizer._update_scale, optimizer.step = fall_only, step_then_grow
