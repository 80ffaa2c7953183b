"""Parameters, FLOPs and bytes of a model by formula: read by --dry-run, MFU, `dsllm doctor` and the tests."""

from dsllm.counts.activations import LOGITS_AT_A_TIME, activation_bytes, kept_activation_bytes
from dsllm.counts.communication import Communication, communication_bytes, communication_of_step
from dsllm.counts.parameters import (
    ParameterCount,
    flops_per_token,
    largest_parameter,
    matmul_parameters,
    parameter_count,
)
from dsllm.counts.states import ModelStates, checkpoint_bytes, model_states

__all__ = [
    "LOGITS_AT_A_TIME",
    "Communication",
    "ModelStates",
    "ParameterCount",
    "activation_bytes",
    "checkpoint_bytes",
    "communication_bytes",
    "communication_of_step",
    "flops_per_token",
    "kept_activation_bytes",
    "largest_parameter",
    "matmul_parameters",
    "model_states",
    "parameter_count",
]
