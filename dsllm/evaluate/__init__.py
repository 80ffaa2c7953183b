"""dsllm evaluate and dsllm generate: held-out loss, bits per byte, and text."""
