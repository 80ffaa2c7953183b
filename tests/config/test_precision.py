"""Precision: auto by device, and one answer to which parameters are fp32."""

import pytest
import torch

from dsllm.config.precision import compute_bits, has_fp32_parameters, parameter_bits, resolve_precision
from dsllm.config.train import PRECISIONS, Precision
from dsllm.engine.processes.device import compute_dtype, parameter_dtype


def test_auto_is_resolved_by_the_device_and_what_was_asked_stays():
    assert resolve_precision("auto", "cpu") == "fp32_compute_bf16"
    assert resolve_precision("auto", "cuda") == "bf16"
    for precision in PRECISIONS:
        assert resolve_precision(precision, "cpu") == resolve_precision(precision, "cuda") == precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_are_those_of_the_types_that_the_engine_makes(precision: Precision):
    assert parameter_bits(precision) == 8 * parameter_dtype(precision).itemsize
    assert compute_bits(precision) == 8 * compute_dtype(precision).itemsize
    assert has_fp32_parameters(precision) == (parameter_dtype(precision) == torch.float32)
