"""The final DeepSpeed config: one pure function of the run, a DeepSpeed JSON and the layout; every clash in one error."""

from collections.abc import Iterator, Mapping
from typing import Any

from dsllm.config.precision import has_fp32_parameters
from dsllm.config.run import RunConfig
from dsllm.engine.settings.check import WHERE, Values, clashes, read_values
from dsllm.engine.settings.key import AUTO, Key, nested
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import offload_defaults, swap_folder
from dsllm.engine.settings.rules import ACCUMULATION, COMMUNICATION, HPZ, REDUCE_SCATTER, check_rules
from dsllm.engine.settings.table import AIO, OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, STAGE, TABLE
from dsllm.errors import ConfigError


def gradient_accumulation(config: RunConfig, data_size: int) -> int:
    """Micro-batches per data-parallel rank and optimizer step.

    Raises:
        ConfigError: the global batch does not divide; names the nearest that do.
    """
    micro, batch = config.train.micro_batch_sequences, config.train.global_batch_sequences
    unit = micro * data_size
    if batch % unit == 0:
        return batch // unit
    below, above = batch // unit * unit, -(-batch // unit) * unit
    batches = " or ".join(str(b) for b in (below, above) if b)
    micros = [m for m in range(1, batch // data_size + 1) if batch % (m * data_size) == 0]
    nearest = sorted(sorted(micros, key=lambda m: abs(m - micro))[:2])
    or_micro = f"; or train.micro_batch_sequences {' or '.join(map(str, nearest))}" if nearest else ""
    raise ConfigError(
        f"train.global_batch_sequences {batch} is not divisible by micro-batch {micro} x {data_size} ranks = {unit}: "
        f"use train.global_batch_sequences {batches}{or_micro}"
    )


def final_config(config: RunConfig, given: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The config that DeepSpeed gets, complete: every key whose default surprises is written out.

    Args:
        given: the DeepSpeed JSON.
    Raises:
        ConfigError: every clash between the run and the JSON, every unknown key and every refused combination, at once.
    """
    values, problems = read_values(given)
    problems += _resolve_hpz(given, values, layout)
    problems += check_rules(values, layout)
    accumulation = None
    try:
        accumulation = gradient_accumulation(config, layout.data_size)
    except ConfigError as error:
        problems += error.problems
    of_run = _of_run(config, layout, accumulation)
    problems += clashes(values, of_run)
    if problems:
        raise ConfigError(
            [f"{config.deepspeed}: {p.removeprefix(WHERE)}" if p.startswith(WHERE) else p for p in problems]
        )
    stage = values.get(STAGE, 0)
    if stage == 0 and has_fp32_parameters(layout.precision):
        # DeepSpeed's fp32 ZeRO-0 neither reports the norm nor notices a non-finite one: dsllm's step does both, and clips
        of_run["gradient_clipping"] = 0.0
    return nested(of_run | dict(_of_json(values, config, layout)))


def _resolve_hpz(given: Mapping[str, Any], values: Values, layout: Layout) -> Iterator[str]:
    """zero_hpz_partition_size "auto" is all ranks of a host. At every other key, "auto" is the same as no key."""
    zero = given.get("zero_optimization")
    if not isinstance(zero, Mapping) or zero.get(TABLE[HPZ].name) != AUTO or values.get(STAGE, 0) != 3:
        return
    if layout.ranks_by_node is not None and layout.ranks_per_node is None:
        yield (
            f'{WHERE}{HPZ}: "auto" is all ranks of a host, but the hosts have {" and ".join(map(str, layout.ranks_by_node))} '
            "ranks: give a number that divides each of them, or start as many ranks on every host"
        )
    values[HPZ] = layout.ranks_per_node


def _of_run(config: RunConfig, layout: Layout, accumulation: int | None) -> dict[str, Any]:
    """What the run decides, by path."""
    train, scale = config.train, config.train.loss_scale
    return {
        "train_batch_size": train.global_batch_sequences,
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clipping,
        "bf16.enabled": layout.precision == "bf16",
        "fp16.enabled": layout.precision == "fp16",
        "fp16.loss_scale": scale.static,
        "fp16.initial_scale_power": scale.initial_power,
        "fp16.loss_scale_window": scale.window_steps,
        "fp16.hysteresis": scale.hysteresis,
        "fp16.min_loss_scale": scale.minimum,
    }


def _of_json(values: Values, config: RunConfig, layout: Layout) -> Iterator[tuple[str, Any]]:
    """What the JSON decides, by path: its own values, and otherwise those that suit the layout, or the table's."""
    stage = values.get(STAGE, 0)
    devices = {block: values.get(f"{block}.device", "none") for block in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM)}
    devices[AIO] = "nvme" if "nvme" in devices.values() else "none"
    folders = [f"{block}.nvme_path" for block in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM) if devices[block] == "nvme"]
    chosen = values | {path: str(swap_folder(values[path], config)) for path in folders}
    defaults = offload_defaults(values, config, layout) | _layout_defaults(stage, layout)
    for path, key in TABLE.items():
        value = chosen.get(path, defaults.get(path, key.default))
        if key.owner == "json" and value is not None and _has_effect(key, stage, devices):
            yield path, value


def _layout_defaults(stage: int, layout: Layout) -> dict[str, Any]:
    """Defaults that depend on the device and the precision, by path."""
    found: dict[str, Any] = {}
    if layout.device == "cpu" and stage in (1, 2):
        found[REDUCE_SCATTER] = False  # gloo's reduce-scatter is slower than its all-reduce
    if stage and not has_fp32_parameters(layout.precision):
        found |= {ACCUMULATION: "fp32", COMMUNICATION: "fp32"}  # DeepSpeed's own default is 16 bits
    return found


def _has_effect(key: Key, stage: int, devices: Mapping[str, str]) -> bool:
    """Whether the key means something here.

    Args:
        devices: where each object of the JSON that offloads something puts it.
    """
    device = devices.get(key.block)
    return stage in key.stages and (device in (None, "nvme") or (device == "cpu" and not key.nvme_only))
