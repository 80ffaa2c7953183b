"""dsllm train: the loop, its schedule, interrupts, metrics and saving."""
