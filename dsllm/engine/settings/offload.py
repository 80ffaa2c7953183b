"""Offload and ZeRO++ in the DeepSpeed JSON: what is handed on, what is written where it is silent, what is refused and why."""

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.engine.settings.layout import Layout

OFFLOAD_OPTIMIZER, OFFLOAD_PARAM = "offload_optimizer", "offload_param"
AUTO = "auto"
DEVICES = ("none", "cpu", "nvme")

OPTIMIZER_KEYS: dict[str, Any] = {
    "device": "none", "pin_memory": True, "nvme_path": None, "buffer_count": AUTO, "pipeline_read": False,
    "pipeline_write": False,
}  # fmt: skip
"""zero_optimization.offload_optimizer: the keys that are handed on, and what is written where the JSON is silent."""

PARAM_KEYS: dict[str, Any] = {
    "device": "none", "pin_memory": True, "nvme_path": None, "buffer_count": 5, "buffer_size": AUTO,
    "max_in_cpu": 1_000_000_000,
}  # fmt: skip
"""zero_optimization.offload_param: the same."""

NVME_ONLY = {"nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write"}
"""Sub-keys of both that mean nothing without NVMe, and are left out then."""

AIO_KEYS: dict[str, Any] = {
    "block_size": 1_048_576, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False, "overlap_events": True,
    "use_gds": False,
}  # fmt: skip
"""aio: how the NVMe is read and written; DeepSpeed's own defaults, written out."""

ZEROPP_KEYS: dict[str, Any] = {
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False,
}  # fmt: skip
"""zero_optimization: ZeRO++ (Wang et al. 2023); written out at stage 3, where it belongs."""

REFUSED = {
    "ratio": (
        1.0,
        "a part of the states on the device needs DeepSpeed's own CPU Adam; dsllm trains with torch's AdamW: "
        "leave it at 1.0",
    ),
    "fast_init": (False, "it shortens the first write of values that dsllm replaces right afterwards"),
    "super_offload": (False, "it steps in processes of its own, with DeepSpeed's own CPU Adam; not proven here"),
    "cpuadam_cores_perc": (None, "it belongs to super_offload, which is refused"),
}
"""Sub-keys that DeepSpeed knows and dsllm refuses: the value that switches them off, and the reason."""

REUSE_DISTANCE = "stage3_max_reuse_distance"

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
    zero: Mapping[str, Any], num_parameters: int, precision: Precision, world_size: int
) -> OffloadedBytes:
    """Model states of one rank where a step needs most of them, as DeepSpeed 0.19.8 spreads them.

    Buffers come on top: of the largest parameter at stages 1 and 2, of `buffer_count` sub-groups with NVMe.

    Args:
        zero: the final config's `zero_optimization`, which offloads something.
        precision: a resolved one, not auto.
    """
    optimizer, param = offload_devices(zero)
    weights = 4 if precision in ("fp32", "fp32_compute_bf16") else 2
    summed = 2 if precision == "fp16" else 4
    states = 12 + 4  # masters, moments, and the gradient that AdamW reads
    place = {"none": "device", "cpu": "host", "nvme": "nvme"}
    shared = {"device": 0, "host": 0, "nvme": 0}
    if zero["stage"] == 3:
        shared[place[optimizer]] += states
        shared["host"] += 0 if optimizer == "none" else summed
        shared[place[param]] += weights
        whole = 0
    else:  # beside its weights a rank's part waits in 16 bits, or fp32, to be copied to the device
        shared["host"] += states + weights
        shared["host" if weights == 4 else "device"] += summed
        whole = weights * num_parameters
    spread = {key: -(-value * num_parameters // world_size) for key, value in shared.items()}
    return OffloadedBytes(device=whole + spread["device"], host=spread["host"], nvme=spread["nvme"])


def offload_devices(zero: Mapping[str, Any]) -> tuple[str, str]:
    """Where the optimizer's states and the parameters go: each "none", "cpu" or "nvme"."""
    blocks = (zero.get(key) for key in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM))
    optimizer, param = (b.get("device", "none") if isinstance(b, Mapping) else "none" for b in blocks)
    return optimizer, param


def check_offload(given: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Everything that is wrong with the offload and ZeRO++ of a DeepSpeed JSON, whatever machine it runs on."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return
    for name, keys in ((OFFLOAD_OPTIMIZER, OPTIMIZER_KEYS), (OFFLOAD_PARAM, PARAM_KEYS)):
        if zero.get(name, AUTO) not in (None, False, AUTO):
            yield from _check_block(f"deepspeed JSON: zero_optimization.{name}", zero[name], keys)
    yield from _check_where(zero)
    yield from _check_aio(given.get("aio"), "nvme" in offload_devices(zero))
    yield from _check_zeropp(zero, layout)
    if given.get("zero_force_ds_cpu_optimizer", AUTO) is True:
        yield (
            "deepspeed JSON: zero_force_ds_cpu_optimizer: it asks for DeepSpeed's own CPU Adam, which compiles for minutes; "
            "torch's fused AdamW steps on the CPU as fast, and is the one that is proven here"
        )


def final_offload(given: Mapping[str, Any], config: RunConfig, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """What offload and ZeRO++ add to `zero_optimization`, and to the top level, of a JSON that passed `check_offload`."""
    zero = given.get("zero_optimization", {})
    if zero.get("stage", 0) == 0:
        return {}, {}
    inner = _filled(ZEROPP_KEYS, zero) if zero["stage"] == 3 else {}
    if inner and zero.get("zero_hpz_partition_size") == AUTO:
        inner["zero_hpz_partition_size"] = layout.ranks_per_node
    to = dict(zip((OFFLOAD_OPTIMIZER, OFFLOAD_PARAM), offload_devices(zero), strict=True))
    for name, keys in ((OFFLOAD_OPTIMIZER, OPTIMIZER_KEYS), (OFFLOAD_PARAM, PARAM_KEYS)):
        if to[name] == "none":
            continue
        block = _filled(keys, zero[name])
        if to[name] == "nvme":
            block["nvme_path"] = str(swap_folder(block["nvme_path"], config))
            if block["buffer_count"] == AUTO:
                block["buffer_count"] = _optimizer_buffers(block)
            if block.get("buffer_size") == AUTO:
                block["buffer_size"] = largest_share(config, layout)
        else:
            block = {key: value for key, value in block.items() if key not in NVME_ONLY}
        inner[name] = block
    if to[OFFLOAD_PARAM] == "nvme":
        inner[REUSE_DISTANCE] = 0
    top: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False} if to[OFFLOAD_OPTIMIZER] != "none" else {}
    if "nvme" in to.values():
        top["aio"] = _filled(AIO_KEYS, given.get("aio") or {})
    return inner, top


def swap_folder(nvme_path: str, config: RunConfig) -> Path:
    """A run's own folder under the NVMe path: DeepSpeed names its files by rank only, so two runs would share them."""
    directory = Path(config.run.directory).absolute()
    return Path(nvme_path) / f"dsllm-{directory.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:12]}"


def largest_share(config: RunConfig, layout: Layout) -> int:
    """Elements of the largest parameter that one rank keeps: what a buffer for swapping must hold."""
    model = config.model
    vocabulary = model.vocab_size or config.tokenizer.vocab_size  # a look before the tokenizer is known
    return -(-counts.largest_parameter(model, vocabulary, config.context_length) // layout.world_size)


def _filled(keys: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return dict(keys) | {key: value for key, value in given.items() if key in keys and value != AUTO}


def _optimizer_buffers(block: Mapping[str, Any]) -> int:
    """One sub-group at a time; one more is read ahead, and one more still written behind, where that is asked for."""
    ahead = block.get("pipeline_read", False) is True
    behind = block.get("pipeline_write", False) is True
    return ADAM_TENSORS * (1 + ahead + behind)


def _check_block(where: str, block: Any, keys: Mapping[str, Any]) -> Iterator[str]:
    """One of the two offload blocks by itself."""
    if not isinstance(block, Mapping):
        yield f'{where}: must be an object such as {{"device": "cpu"}}, but it is {block!r}'
        return
    device = block.get("device", "none")
    if device not in DEVICES:
        yield f"{where}.device: must be one of {', '.join(DEVICES)}, but it is {device!r}"
    for key, value in block.items():
        if key in REFUSED and keys is OPTIMIZER_KEYS:
            off, reason = REFUSED[key]
            if value not in (off, AUTO, None) or (isinstance(value, bool) and not isinstance(off, bool)):
                yield f"{where}.{key}: {reason}"
        elif key not in keys:
            close = difflib.get_close_matches(key, [*keys, *REFUSED], n=1)
            yield f"{where}.{key}: unknown key" + (f"; did you mean '{close[0]}'?" if close else "")
        elif key != "device" and value != AUTO:
            yield from _check_value(f"{where}.{key}", key, value)
    if device == "nvme":
        yield from _check_nvme(where, block)


def _check_value(where: str, key: str, value: Any) -> Iterator[str]:
    known = {**AIO_KEYS, **PARAM_KEYS, **OPTIMIZER_KEYS, **ZEROPP_KEYS}[key]
    if key == "nvme_path":
        if value is not None and not isinstance(value, str):
            yield f"{where}: must be the path of a folder, but it is {value!r}"
    elif isinstance(known, bool):
        if not isinstance(value, bool):
            yield f"{where}: must be true or false, but it is {value!r}"
    elif isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        yield f"{where}: must be a whole number, but it is {value!r}"
    elif value < 1 and key != "max_in_cpu":
        yield f"{where}: must be at least 1, but it is {value}"


def _check_nvme(where: str, block: Mapping[str, Any]) -> Iterator[str]:
    path = block.get("nvme_path", AUTO)
    if path in (AUTO, None, ""):
        yield f"{where}.nvme_path: is missing; name a folder on a local NVMe of every node"
    elif isinstance(path, str) and not Path(path).is_absolute():
        yield f"{where}.nvme_path: must be absolute, as it is the same on every node, but it is {path!r}"
    count, needed = block.get("buffer_count", AUTO), _optimizer_buffers(block)
    if where.endswith(OFFLOAD_OPTIMIZER) and isinstance(count, int) and 1 <= count < needed:
        yield (
            f"{where}.buffer_count: {count} is too few: AdamW works on weights, gradient and two moments at once"
            + (", doubled by each of pipeline_read and pipeline_write" if needed > ADAM_TENSORS else "")
            + f"; at least {needed}, or leave it out"
        )


def _check_where(zero: Mapping[str, Any]) -> Iterator[str]:
    """Which stage can offload what, and what goes together."""
    stage, (optimizer, param) = zero.get("stage", 0), offload_devices(zero)
    where = "deepspeed JSON: zero_optimization"
    if stage == 0 and optimizer in ("cpu", "nvme"):
        yield f"{where}.{OFFLOAD_OPTIMIZER}: ZeRO stage 0 keeps the optimizer's states on the device; use stage 1, 2 or 3"
    if stage in (1, 2) and optimizer == "nvme":
        yield f"{where}.{OFFLOAD_OPTIMIZER}.device: nvme needs stage 3; at stage {stage} DeepSpeed would keep them in memory"
    if stage != 3 and param in ("cpu", "nvme"):
        yield f"{where}.{OFFLOAD_PARAM}: needs stage 3: at stage {stage} the parameters are not partitioned"
    if stage == 3 and param == "nvme" and optimizer != "nvme":
        yield (
            f"{where}.{OFFLOAD_PARAM}.device: nvme, but the optimizer's states, which are larger, stay in memory: "
            f"set {OFFLOAD_OPTIMIZER}.device to nvme too, or this to cpu"
        )
    if param == "nvme" and zero.get(REUSE_DISTANCE, AUTO) not in (0, AUTO):
        yield (
            f"{where}.{REUSE_DISTANCE}: {zero[REUSE_DISTANCE]}, but a parameter that is kept for its next use keeps its "
            "buffer, and DeepSpeed stops ('Not enough buffers') when none is left; leave it out, or at 0"
        )


def _check_aio(aio: Any, used: bool) -> Iterator[str]:
    if aio in (None, AUTO, {}):
        return
    if not isinstance(aio, Mapping):
        yield f"deepspeed JSON: aio: must be an object, but it is {aio!r}"
        return
    if not used:
        yield "deepspeed JSON: aio: nothing is offloaded to NVMe here, so it would have no effect"
    for key, value in aio.items():
        where = f"deepspeed JSON: aio.{key}"
        if key not in AIO_KEYS:
            close = difflib.get_close_matches(key, AIO_KEYS, n=1)
            yield f"{where}: unknown key (DeepSpeed would ignore it silently)" + (
                f"; did you mean '{close[0]}'?" if close else ""
            )
        elif key == "use_gds" and value is True:
            yield f"{where}: GPUDirect Storage is not proven here"
        elif value != AUTO:
            found = list(_check_value(where, key, value))
            yield from found
            if not found and key == "block_size" and value % 4096:
                yield f"{where}: direct I/O works in whole pages: it must be a multiple of 4096, but it is {value}"


def _check_zeropp(zero: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    where = "deepspeed JSON: zero_optimization"
    asked = {key: zero[key] for key in ZEROPP_KEYS if zero.get(key, AUTO) not in (AUTO, None)}
    for key, value in asked.items():
        yield from _check_value(f"{where}.{key}", key, value)
    hpz = asked.get("zero_hpz_partition_size", 1)
    weights = asked.get("zero_quantized_weights") is True
    gradients = asked.get("zero_quantized_gradients") is True
    if zero.get("stage", 0) != 3:
        for key in (k for k, v in asked.items() if v not in (False, ZEROPP_KEYS[k])):
            yield f"{where}.{key}: ZeRO++ needs stage 3"
    elif isinstance(hpz, int) and hpz > 1:
        if layout.ranks_per_node % hpz:
            yield (
                f"{where}.zero_hpz_partition_size: {hpz} does not divide the {layout.ranks_per_node} ranks of a node: "
                "the second copy of the weights would span nodes"
            )
        if offload_devices(zero)[1] == "nvme":
            yield f"{where}.zero_hpz_partition_size: DeepSpeed cannot put the second copy of the weights on NVMe"
    if weights and layout.device == "cpu":
        yield (
            f"{where}.zero_quantized_weights: its kernels are CUDA's: DeepSpeed's CPU backend does not implement them "
            "('This op had not been implemented on CPU backend')"
        )
    if gradients and layout.num_nodes == 1:
        yield (
            f"{where}.zero_quantized_gradients: on one node DeepSpeed accepts it and leaves it out silently; "
            "it acts between nodes only"
        )
    if gradients and layout.device == "cpu":
        yield f"{where}.zero_quantized_gradients: its kernels are CUDA's: DeepSpeed's CPU backend does not implement them"
