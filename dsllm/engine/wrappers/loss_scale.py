"""fp16's loss scale: its state, and fixes for when DeepSpeed's dynamic scale changes."""

from collections.abc import Mapping
from typing import Any

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's scaler that decide when the scale changes next; a static one has only the first."""


def scaler_state(optimizer: Any) -> dict[str, float]:
    """The loss scale and its counters."""
    scaler = optimizer.loss_scaler
    return {name: float(getattr(scaler, name)) for name in _STATE if name in vars(scaler)}


def load_scaler_state(optimizer: Any, saved: Mapping[str, float]) -> None:
    """Restore a saved loss scale. A static scale stays as configured but for its value."""
    scaler = optimizer.loss_scaler
    for name in _STATE:
        if name in saved and name in vars(scaler):
            setattr(scaler, name, type(getattr(scaler, name))(saved[name]))


def stay_at_minimum(optimizer: Any) -> None:
    """Keep the scale at its minimum and let the run decide: DeepSpeed would end the run there, without a reason."""
    scaler = optimizer.loss_scaler
    if scaler.dynamic:
        scaler.raise_error_at_min_scale = False


def grow_after_step(optimizer: Any) -> None:
    """Fix the order in which DeepSpeed's ZeRO optimizers work.

    Their `step` first updates the loss scale and then divides the gradients by it. In the step in which the scale
    doubles, the gradients are divided by twice what they were multiplied with: the step is taken with half the gradient,
    and clipping misses gradients of up to twice its limit (stage 3 also reports half the norm). Found by the parity table,
    deepspeed 0.19.8. With this fix the scale falls at once, as an overflowing step is skipped, and grows when the step
    is over.
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
