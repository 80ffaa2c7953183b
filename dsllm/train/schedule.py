"""The learning rate as a function of the step."""

import math

from dsllm.config.run import RunConfig


def seam(step: int, before: RunConfig, now: RunConfig) -> str:
    """What the learning rate does where a run continues with another length or schedule; empty: the same as before.

    Args:
        step: the next step, from 0
    """
    planned, rate = learning_rate_at(step, before), learning_rate_at(step, now)
    if step == 0 or math.isclose(planned, rate, rel_tol=1e-6):
        return ""
    return (
        f"the schedule now ends at step {now.num_steps:,} instead of {before.num_steps:,}: the learning rate continues at "
        f"{rate:.3g} in step {step + 1:,}, after {learning_rate_at(step - 1, before):.3g} in step {step:,}"
    )


def learning_rate_at(step: int, config: RunConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of a run.

    Linear warm-up from peak / warmup to the peak, then the schedule's shape down to end_ratio x peak at the last step:
    cosine (Loshchilov and Hutter 2017), linear, or warm-up-stable-decay (Hu et al. 2024).
    """
    schedule, peak = config.train.schedule, config.train.optimizer.learning_rate
    warmup = config.steps_of(schedule.warmup_steps, schedule.warmup_tokens, 0)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.shape == "constant":
        return peak
    start = warmup
    if schedule.shape == "wsd":
        decay = config.steps_of(schedule.decay_steps, schedule.decay_tokens, config.num_steps // 10)
        start = max(warmup, config.num_steps - decay)
    fraction = min(1.0, max(0.0, (step + 1 - start) / max(1, config.num_steps - start)))
    remaining = (1 + math.cos(math.pi * fraction)) / 2 if schedule.shape == "cosine" else 1 - fraction
    return peak * (schedule.end_ratio + (1 - schedule.end_ratio) * remaining)
