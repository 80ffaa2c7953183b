"""Finds the wrapper class of this package for an optimizer wrapper of DeepSpeed."""

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dsllm.engine.deepspeed_library import TESTED_VERSIONS, deepspeed
from dsllm.engine.processes.process_group import World
from dsllm.engine.wrappers.flat_partitions import Bf16Wrapper, FlatWrapper
from dsllm.engine.wrappers.stage_3 import Stage3Wrapper
from dsllm.engine.wrappers.whole_parameters import NoWrapper, UnfusedWrapper
from dsllm.engine.wrappers.wrapper import Wrapper
from dsllm.errors import LaunchError

WRAPPERS: dict[type, type[Wrapper]] = {
    FP16_UnfusedOptimizer: UnfusedWrapper,
    DeepSpeedZeroOptimizer: FlatWrapper,
    BF16_Optimizer: Bf16Wrapper,
    DeepSpeedZeroOptimizer_Stage3: Stage3Wrapper,
}


def wrapper_of(engine: Any, world: World) -> Wrapper:
    """The class that knows this engine's optimizer.

    Raises:
        LaunchError: this version of DeepSpeed has another wrapper, or one without the attributes that are read: it would
            save or load the wrong numbers. Names the class and what is missing.
    """
    kind = type(engine.optimizer)
    plain = NoWrapper if isinstance(engine.optimizer, torch.optim.Optimizer) else None
    known = WRAPPERS.get(kind, plain)
    wrapper = known(engine, world) if known else None
    missing = wrapper.missing_attributes if wrapper else []
    if wrapper is None or missing:
        raise LaunchError(
            f"deepspeed {deepspeed.__version__}: dsllm does not know how to read the state of {kind.__name__}"
            + (f" (missing: {', '.join(missing)})" if missing else "")
            + f"; it was tested with deepspeed {TESTED_VERSIONS}: install that version"
        )
    return wrapper
