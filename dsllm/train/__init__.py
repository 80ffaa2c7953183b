"""dsllm train: the loop, its schedule, interrupts, metrics, saving and resuming."""
