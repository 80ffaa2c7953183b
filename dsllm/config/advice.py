"""What a run can do, but nobody means to: the learning rate never arrives, or no training survives it."""

from collections.abc import Iterator

from dsllm.config.run import RunConfig

HIGHEST_LEARNING_RATE = 0.1
"""Above it AdamW has not been seen to train a language model; published peaks are 1e-5 to 1e-2."""


def advice_on(config: RunConfig) -> Iterator[str]:
    """Sentences about a run that is accepted, each beginning with the field that it is about."""
    schedule, peak, steps = config.train.schedule, config.train.optimizer.learning_rate, config.num_steps
    if peak > HIGHEST_LEARNING_RATE:
        yield (
            f"train.optimizer.learning_rate: {peak:g} is far above what AdamW trains with (1e-5 to 1e-2): "
            "the loss will probably diverge"
        )
    if peak == 0:
        yield "train.optimizer.learning_rate: is 0, so no weight will change"
    warmup = config.steps_of(schedule.warmup_steps, schedule.warmup_tokens, 0)
    unit = "tokens" if schedule.warmup_tokens is not None else "steps"
    if warmup > steps:
        yield (
            f"train.schedule.warmup_{unit}: the warm-up takes {warmup:,} steps and the run has {steps:,}: the learning rate "
            f"ends at {peak * steps / warmup:.3g} and never reaches its peak of {peak:g}"
        )
    elif schedule.shape == "wsd":
        decay = config.steps_of(schedule.decay_steps, schedule.decay_tokens, steps // 10)
        if decay > steps - warmup:
            yield (
                f"train.schedule.shape: the decay of {decay:,} steps is cut to the {steps - warmup:,} that are left of "
                f"{steps:,} after the warm-up"
            )
