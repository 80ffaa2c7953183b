"""What a precision means for the parameters of the model."""

from dsllm.config.train import Precision


def has_fp32_parameters(precision: Precision) -> bool:
    """Whether the parameters are fp32. In the other precisions they have 16 bits, and DeepSpeed keeps fp32 masters."""
    return precision in ("fp32", "fp32_compute_bf16")
