"""dsllm doctor: checks what a run depends on, on every rank, and says what is wrong and what to do about it."""
