"""Offload: where it puts the model states, and what final_config writes for it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.precision import has_fp32_parameters
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.table import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM

OFFLOAD_BLOCKS = ("offload_optimizer", "offload_param")
"""Objects in `zero_optimization` that offload something: the optimizer's states, the parameters."""

ADAM_TENSORS = 4
"""Weights, gradient and two moments: the buffers that one sub-group needs while AdamW works on it."""


@dataclass(frozen=True, kw_only=True)
class OffloadedBytes:
    """Where a rank's model states are once offload has moved them, in bytes."""

    device: int
    """Still on the device; ZeRO-3's gathered parameters come on top."""
    host: int
    """In the node's memory."""
    nvme: int
    """In files."""


def offloaded_bytes(
    zero: Mapping[str, Any], num_parameters: int, precision: Precision, data_size: int
) -> OffloadedBytes:
    """Bytes of one rank's model states at the moment of a step when they are largest, as DeepSpeed 0.19.8 places them.

    Buffers come on top: of the largest parameter at stages 1 and 2, of `buffer_count` sub-groups with NVMe.

    Args:
        zero: the final config's `zero_optimization`, which offloads something.
        precision: a resolved one, not auto.
        data_size: ranks that share the states.
    """
    optimizer, param = offload_devices(zero)
    weights = 4 if has_fp32_parameters(precision) else 2
    summed = 2 if precision == "fp16" else 4
    states = 12 + 4  # masters, moments, and the gradient that AdamW reads
    place = {"none": "device", "cpu": "host", "nvme": "nvme"}
    shared = {"device": 0, "host": 0, "nvme": 0}
    if zero["stage"] == 3:
        shared[place[optimizer]] += states
        shared["host"] += 0 if optimizer == "none" else summed
        shared[place[param]] += weights
        whole = 0
    else:  # a copy of the rank's part of the weights waits in the host's memory to be copied to the device
        shared["host"] += states + weights
        shared["host" if weights == 4 else "device"] += summed
        whole = weights * num_parameters
    spread = {key: -(-value * num_parameters // data_size) for key, value in shared.items()}
    return OffloadedBytes(device=whole + spread["device"], host=spread["host"], nvme=spread["nvme"])


def offload_devices(zero: Mapping[str, Any]) -> tuple[str, str]:
    """Where the optimizer's states and the parameters go: each "none", "cpu" or "nvme".

    Args:
        zero: the final config's `zero_optimization`.
    """
    optimizer, param = (zero.get(name, {}).get("device", "none") for name in OFFLOAD_BLOCKS)
    return optimizer, param


def offload_defaults(values: Mapping[str, Any], config: RunConfig, layout: Layout) -> dict[str, Any]:
    """What is written for offload where the JSON does not set it and the table has no value, by path.

    Args:
        values: what the JSON sets, by path.
    """
    found: dict[str, Any] = {f"{OFFLOAD_OPTIMIZER}.buffer_count": optimizer_buffers(values)}
    if values.get(f"{OFFLOAD_OPTIMIZER}.device", "none") != "none":
        found["zero_force_ds_cpu_optimizer"] = False  # else DeepSpeed requires its own CPU Adam
    if values.get(f"{OFFLOAD_PARAM}.device") == "nvme":
        found[f"{OFFLOAD_PARAM}.buffer_size"] = largest_share(config, layout)
        # a parameter that is kept for its next use keeps its buffer, and DeepSpeed stops when none is left
        found["zero_optimization.stage3_max_reuse_distance"] = 0
    return found


def optimizer_buffers(values: Mapping[str, Any]) -> int:
    """Buffers that offload of the optimizer to NVMe needs, of the size of a sub-group.

    One sub-group at a time is in memory, one more where the next is read ahead, one more where the last is still written.
    """
    ahead = values.get(f"{OFFLOAD_OPTIMIZER}.pipeline_read") is True
    behind = values.get(f"{OFFLOAD_OPTIMIZER}.pipeline_write") is True
    return ADAM_TENSORS * (1 + ahead + behind)


def swap_folder(nvme_path: str, config: RunConfig) -> Path:
    """A run's own folder under the NVMe path: DeepSpeed names its files by rank only, so two runs would share them."""
    directory = Path(config.run.directory).absolute()
    return Path(nvme_path) / f"dsllm-{directory.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:12]}"


def largest_share(config: RunConfig, layout: Layout) -> int:
    """Elements of the largest parameter that one rank keeps: what a buffer for swapping must hold."""
    model = config.model
    vocabulary = model.vocab_size or config.tokenizer.vocab_size  # before the tokenizer is known, its requested size
    return -(-counts.largest_parameter(model, vocabulary, config.context_length) // layout.data_size)
