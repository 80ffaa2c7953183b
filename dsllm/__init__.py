"""dsllm pretrains decoder-only language models with DeepSpeed."""

__version__ = "0.1.0"
