"""Rules between several keys of a DeepSpeed JSON, the run and the layout: what DeepSpeed computes wrongly or ignores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsllm.config.train import Precision
from dsllm.engine.settings.check import WHERE, Values
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import ADAM_TENSORS, optimizer_buffers
from dsllm.engine.settings.table import AIO, OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, STAGE

ACCUMULATION = "data_types.grad_accum_dtype"
COMMUNICATION = "communication_data_type"
REDUCE_SCATTER = "zero_optimization.reduce_scatter"
REUSE_DISTANCE = "zero_optimization.stage3_max_reuse_distance"
HPZ = "zero_optimization.zero_hpz_partition_size"
QUANTIZED_WEIGHTS = "zero_optimization.zero_quantized_weights"
QUANTIZED_GRADIENTS = "zero_optimization.zero_quantized_gradients"
PREDIVIDE = "gradient_predivide_factor"

GRADIENT_DTYPES: dict[Precision, str] = {"fp32": "fp32", "fp32_compute_bf16": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""The type of the parameters, and of their gradients as backward makes them."""

ZERO_1_INSTEAD = "use ds_configs/zero1.json, which on one rank computes the same"
NO_CPU_KERNELS = "its kernels are CUDA's, and DeepSpeed's CPU backend does not implement them"


def check_rules(values: Values, layout: Layout) -> Iterator[str]:
    """Every broken rule, whatever machine it is checked on.

    Args:
        values: see `read_values`, with `zero_hpz_partition_size` resolved.
    """
    yield from _check_fp16(values, layout)
    for path in (ACCUMULATION, COMMUNICATION):
        yield from _check_dtype(path, values, layout)
    yield from _check_division_before_the_sum(values, layout)
    yield from _check_offload(values)
    yield from _check_nvme(values)
    yield from _check_zeropp(values, layout)


def _check_fp16(values: Values, layout: Layout) -> Iterator[str]:
    if layout.precision != "fp16":
        return
    if layout.device == "cpu":
        yield (
            "train.precision: fp16, but this accelerator (cpu) has no fp16: use fp32_compute_bf16 (as fast as this CPU gets), "
            "fp32, or bf16; or leave train.precision at auto"
        )
    if values.get(STAGE, 0) == 0:
        yield (
            "train.precision: fp16 with ZeRO stage 0: DeepSpeed divides the gradients by a loss scale that it never applied; "
            + ZERO_1_INSTEAD
        )


def _check_dtype(path: str, values: Values, layout: Layout) -> Iterator[str]:
    """fp32, or the parameters' own 16 bits; gradients of fp32 parameters may travel in bf16."""
    value, own = values.get(path), GRADIENT_DTYPES[layout.precision]
    if value is None:
        return
    allowed = list(dict.fromkeys(["fp32", "bf16" if own == "fp32" and path == COMMUNICATION else own]))
    where = f"{WHERE}{path}: {value} with train.precision {layout.precision}"
    if value not in allowed:
        yield f"{where} {_why_not(path, value, own)}: use {' or '.join(allowed)}"
    elif values.get(STAGE, 0) == 0 and value != own and path == ACCUMULATION:
        yield f"{where} at ZeRO stage 0: DeepSpeed has no such optimizer there; {ZERO_1_INSTEAD}"


def _why_not(path: str, value: str, own: str) -> str:
    if own == "fp32":
        return "would overflow" if path == COMMUNICATION else f"would round fp32 gradients to {value} at every addition"
    if path == ACCUMULATION:
        return f"would add up {own} gradients in a third type"
    loss = "bf16 keeps 3 bits less than fp16" if own == "fp16" else "fp16 overflows where bf16 does not"
    return f"would send {own} gradients in a third type, and {loss}"


def _check_division_before_the_sum(values: Values, layout: Layout) -> Iterator[str]:
    """Dividing gradients by the number of ranks before they are summed works with all-reduce, at stages 0 to 2."""
    stage, scatter = values.get(STAGE, 0), values.get(REDUCE_SCATTER, layout.device != "cpu")
    requested = {
        "prescale_gradients": values.get("prescale_gradients") is True,
        PREDIVIDE: values.get(PREDIVIDE) not in (None, 1),
    }
    for path in (path for path, on in requested.items() if on):
        if stage == 3:
            yield (
                f"{WHERE}{path}: not at ZeRO stage 3: there DeepSpeed divides by the number of ranks before the sum in any "
                "case, and with a factor equal to it would divide twice"
            )
        elif stage in (1, 2) and scatter:
            yield f"{WHERE}{path}: works with all-reduce only: set {REDUCE_SCATTER} to false"


def _check_offload(values: Values) -> Iterator[str]:
    """Which stage can offload what, and what goes together."""
    stage, optimizer, param = values.get(STAGE, 0), _device(values, OFFLOAD_OPTIMIZER), _device(values, OFFLOAD_PARAM)
    for block in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM):
        if f"{block}.device" not in values and any(path.startswith(f"{block}.") for path in values):
            yield f'{WHERE}{block}.device: is missing, so nothing would be offloaded: set "cpu", "nvme" or "none"'
    if stage == 0 and optimizer in ("cpu", "nvme"):
        yield f"{WHERE}{OFFLOAD_OPTIMIZER}: ZeRO stage 0 keeps the optimizer's states on the device; use stage 1, 2 or 3"
    if stage in (1, 2) and optimizer == "nvme":
        yield f"{WHERE}{OFFLOAD_OPTIMIZER}.device: nvme needs stage 3; at stage {stage} DeepSpeed would keep them in memory"
    if stage in (0, 1, 2) and param in ("cpu", "nvme"):
        yield f"{WHERE}{OFFLOAD_PARAM}: needs stage 3: at stage {stage} the parameters are not partitioned"
    if stage == 3 and param == "nvme" and optimizer in ("none", "cpu"):
        yield (
            f"{WHERE}{OFFLOAD_PARAM}.device: nvme, but the optimizer's states, which are larger, stay in memory: "
            f"set {OFFLOAD_OPTIMIZER}.device to nvme too, or this to cpu"
        )
    if param == "nvme" and values.get(REUSE_DISTANCE):
        yield (
            f"{WHERE}{REUSE_DISTANCE}: {values[REUSE_DISTANCE]}, but a parameter that is kept for its next use keeps its "
            "buffer, and DeepSpeed stops ('Not enough buffers') when none is left; leave it out, or at 0"
        )


def _check_nvme(values: Values) -> Iterator[str]:
    """What offload to NVMe needs, and what has no effect without it."""
    on_nvme = [block for block in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM) if _device(values, block) == "nvme"]
    for block in on_nvme:
        path = values.get(f"{block}.nvme_path", "")
        if path == "":
            yield f"{WHERE}{block}.nvme_path: is missing; name a folder on a local NVMe of every node"
        elif path is not None and "$" in path:
            yield f"{WHERE}{block}.nvme_path: variables are not replaced here: write the folder's name, but it is {path!r}"
        elif path is not None and not Path(path).is_absolute():
            yield f"{WHERE}{block}.nvme_path: must be absolute, as it is the same on every node, but it is {path!r}"
    count, needed = values.get(f"{OFFLOAD_OPTIMIZER}.buffer_count"), optimizer_buffers(values)
    if OFFLOAD_OPTIMIZER in on_nvme and count is not None and count < needed:
        doubled = ", doubled by each of pipeline_read and pipeline_write" if needed > ADAM_TENSORS else ""
        yield (
            f"{WHERE}{OFFLOAD_OPTIMIZER}.buffer_count: {count} is too few: AdamW works on weights, gradient and two moments "
            f"at once{doubled}; at least {needed}, or leave it out"
        )
    block_size = values.get(f"{AIO}.block_size")
    if block_size is not None and block_size % 4096:
        yield f"{WHERE}{AIO}.block_size: direct I/O works in whole pages: must be a multiple of 4096, but it is {block_size}"
    if not on_nvme and any(path.startswith(f"{AIO}.") for path in values):
        yield f"{WHERE}{AIO}: nothing is offloaded to NVMe here, so it would have no effect"


def _check_zeropp(values: Values, layout: Layout) -> Iterator[str]:
    hpz, weights, gradients = values.get(HPZ) or 1, values.get(QUANTIZED_WEIGHTS), values.get(QUANTIZED_GRADIENTS)
    requested = {HPZ: hpz > 1, QUANTIZED_WEIGHTS: weights, QUANTIZED_GRADIENTS: gradients}
    if values.get(STAGE, 0) in (0, 1, 2):
        for path in (path for path, on in requested.items() if on):
            yield f"{WHERE}{path}: ZeRO++ needs stage 3"
    elif hpz > 1:
        known = layout.ranks_by_node is not None
        hosts = sorted(set(layout.ranks_by_node or (layout.mesh.world_size,))) if known else []
        if any(ranks % hpz for ranks in hosts):
            yield (
                f"{WHERE}{HPZ}: {hpz} does not divide the {' and '.join(map(str, hosts))} ranks of a node: "
                "the second copy of the weights would span nodes"
            )
        if _device(values, OFFLOAD_PARAM) == "nvme":
            yield f"{WHERE}{HPZ}: DeepSpeed cannot put the second copy of the weights on NVMe"
    if weights and layout.device == "cpu":
        yield f"{WHERE}{QUANTIZED_WEIGHTS}: {NO_CPU_KERNELS}"
    if gradients and layout.num_nodes == 1:
        yield (
            f"{WHERE}{QUANTIZED_GRADIENTS}: on one node DeepSpeed accepts it and leaves it out silently; "
            "it acts between nodes only"
        )
    if gradients and layout.device == "cpu":
        yield f"{WHERE}{QUANTIZED_GRADIENTS}: {NO_CPU_KERNELS}"


def _device(values: Values, block: str) -> Any:
    return values.get(f"{block}.device", "none")
