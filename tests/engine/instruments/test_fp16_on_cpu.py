"""DeepSpeed's accelerator claims fp16 only while an fp16 engine is built on a CPU."""

import pytest
import torch

from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.instruments.fp16_on_cpu import fp16_on_cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have fp16")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_claim_ends_with_the_block(precision):
    accelerator = deepspeed.accelerator.get_accelerator()
    before = accelerator.is_fp16_supported(), accelerator.supported_dtypes()
    with pytest.raises(KeyError), fp16_on_cpu(precision):
        if precision == "fp16":
            assert accelerator.is_fp16_supported() and torch.float16 in accelerator.supported_dtypes()
        else:
            assert (accelerator.is_fp16_supported(), accelerator.supported_dtypes()) == before
        raise KeyError
    assert (accelerator.is_fp16_supported(), accelerator.supported_dtypes()) == before
    assert "is_fp16_supported" not in vars(accelerator)
