"""dsllm train --dry-run: the resolved run, the final DeepSpeed JSON, parameters, memory and steps. Starts nothing."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dsllm import counts
from dsllm.byte_units import GIB
from dsllm.checkpoint.find import list_checkpoints
from dsllm.cli.preflight import (
    check_before_start,
    notes_before_start,
    prepared_data_of,
    saved_run_in,
    vocabulary_of,
)
from dsllm.config.advice import advice_on
from dsllm.config.data import DataConfig
from dsllm.config.load import run_to_dict
from dsllm.config.precision import resolve_precision
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.config.yaml_file import write_yaml
from dsllm.data.manifest import Manifest
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import offload_devices, offloaded_bytes
from dsllm.mesh import make_mesh
from dsllm.parameters import parameter_table
from dsllm.run_directory import CHECKPOINTS


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What follows from a run on so many ranks, by formula. Bytes are per rank, FLOPs and tokens of the whole run."""

    parameters: counts.ParameterCount
    zero_stage: int
    accumulation: int
    """Micro-batches per rank and step."""
    model_state_bytes: int
    activation_bytes: int
    offloaded: Mapping[str, int]
    """Bytes of model states by place (device, host, nvme); empty without offload."""
    flops_per_token: int
    total_tokens: int
    communication: counts.Communication
    """What the ranks send in one step."""


def show(config: RunConfig, given: Mapping[str, Any], world_size: int, brief: bool = False) -> dict[str, Any]:
    """Print everything that is known of a run before it starts; the same as plain values.

    Args:
        brief: print the summary only

    Raises:
        DsllmError: the run cannot work on so many ranks, or would be refused.
    """
    device = planned_device(config)
    saved = saved_run_in(Path(config.run.directory))
    precision = resolve_precision(_requested_precision(config, saved), device)
    layout = Layout(mesh=make_mesh(config.parallel, world_size), device=device, precision=precision)
    final = final_config(config, given, layout)
    manifest = prepared_data_of(config)
    config, vocabulary = _with_vocabulary(config, manifest)
    train = dataclasses.replace(config.train, precision=precision)
    check_before_start(dataclasses.replace(config, train=train), saved, manifest, device)
    expected = _expected(config, final, layout)
    warnings = [*advice_on(config), *notes_before_start(config, manifest)]
    if not brief:
        print("# run\n" + write_yaml(run_to_dict(config)))
        print("# final DeepSpeed config\n" + json.dumps(final, indent=2) + "\n")
    print("# " + "\n# ".join(_summary(config, expected, layout, vocabulary)))
    for warning in warnings:
        print(f"# warning      {warning}")
    return {
        "run": run_to_dict(config),
        "deepspeed": final,
        "device": device,
        "precision": precision,
        "mesh": asdict(layout.mesh),
        "num_steps": config.num_steps,
        "expected": asdict(expected),
        "warnings": warnings,
    }


def planned_device(config: RunConfig) -> str:
    """The device that the run demands, else the one that this machine would train on: "cpu" or "cuda"."""
    if config.train.device != "auto":
        return config.train.device
    # found without importing torch: NVIDIA's driver leaves a file
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _requested_precision(config: RunConfig, saved: RunConfig | None) -> Precision | Literal["auto"]:
    """The precision that the run asks for; one that leaves it to the machine continues in the one it began in."""
    if (
        config.train.precision != "auto"
        or saved is None
        or not list_checkpoints(Path(config.run.directory) / CHECKPOINTS)
    ):
        return config.train.precision
    return saved.train.precision


def _expected(config: RunConfig, final: Mapping[str, Any], layout: Layout) -> Expected:
    count = counts.parameter_count(config.model, config.context_length)
    zero, precision, accumulation = final["zero_optimization"], layout.precision, final["gradient_accumulation_steps"]
    fp32_gradients = final.get("data_types", {}).get("grad_accum_dtype") == "fp32"  # set in 16-bit precisions only
    offloads = offload_devices(zero) != ("none", "none")
    length = config.data.sequence_length
    return Expected(
        parameters=count,
        zero_stage=zero["stage"],
        accumulation=accumulation,
        model_state_bytes=counts.model_states(
            count.total, zero["stage"], precision, layout.data_size, fp32_gradients, accumulation
        ).most,
        activation_bytes=counts.activation_bytes(config.model, length, config.train, precision, layout.device),
        offloaded=asdict(offloaded_bytes(zero, count.total, precision, layout.data_size)) if offloads else {},
        flops_per_token=counts.flops_per_token(config.model, length),
        total_tokens=config.num_steps * config.tokens_per_step,
        communication=counts.communication_of_step(
            parameter_table(config.model, config.context_length), final, precision
        ),
    )


def _summary(config: RunConfig, expected: Expected, layout: Layout, vocabulary: str) -> list[str]:
    count, per_token, traffic = expected.parameters, expected.flops_per_token, expected.communication
    length, micro = config.data.sequence_length, config.train.micro_batch_sequences
    return [
        f"parameters   {count.total:,} ({count.embedding + count.head:,} of them embedding and head; {vocabulary})",
        f"layout       {layout.mesh.world_size} ranks on {layout.device}, ZeRO stage {expected.zero_stage}, "
        f"{layout.precision}",
        f"batch        {config.train.global_batch_sequences} sequences of {length} = {config.tokens_per_step:,} tokens a step: "
        f"{expected.accumulation} micro-batches of {micro} on each rank",
        f"steps        {config.num_steps:,} for {expected.total_tokens:,} tokens",
        f"compute      {per_token / 1e6:,.1f} MFLOP a token, {per_token * expected.total_tokens:.3g} FLOP in all",
        f"memory       per rank {expected.model_state_bytes / GIB:.2f} GiB of model states and about "
        f"{expected.activation_bytes / GIB:.2f} GiB of activations",
        *_offload_lines(expected.offloaded),
        f"network      per rank and step {traffic.handed / 1e6:,.1f} MB given to collectives, "
        f"{traffic.on_wire(layout.data_size) / 1e6:,.1f} MB sent",
        f"corpus       {_corpus(config)}",
        f"directories  run {config.run.directory}, data {config.data.directory}",
    ]


def _offload_lines(offloaded: Mapping[str, int]) -> list[str]:
    """Where offload puts the model states; no line without offload."""
    if not offloaded:
        return []
    device, host, nvme = (offloaded[place] / GIB for place in ("device", "host", "nvme"))
    return [
        f"offload      per rank {device:.2f} GiB of model states on the device, {host:.2f} GiB in the host's memory, "
        f"{nvme:.2f} GiB on NVMe"
    ]


def with_some_vocabulary(config: RunConfig) -> tuple[RunConfig, str]:
    """A vocabulary size to count with, and which it is: see `vocabulary_of`.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
        DataError: the tokenizer is not there, or the prepared data cannot be used.
    """
    return _with_vocabulary(config, prepared_data_of(config))


def _with_vocabulary(config: RunConfig, manifest: Manifest | None) -> tuple[RunConfig, str]:
    size, origin = vocabulary_of(config, manifest)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size)), origin


def _corpus(config: RunConfig) -> str:
    """The sources by name, and that nobody chose them where the run names none."""
    names = ", ".join(f"{source.name} ({source.kind})" for source in config.data.sources[:5])
    more = f" and {len(config.data.sources) - 5} more" if len(config.data.sources) > 5 else ""
    if config.data.sources == DataConfig().sources:
        return f"{names}: the text of this Python installation; set data.sources to train on your own"
    return names + more
