"""dsllm train --dry-run: the resolved run, the final DeepSpeed JSON, parameters, memory and steps. Starts nothing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.config.load import run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.config.yaml_file import write_yaml
from dsllm.data.manifest import load_manifest
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import offload_devices, offloaded_bytes
from dsllm.mesh import Mesh

GIB = 2**30


def show(config: RunConfig, given: Mapping[str, Any], world_size: int) -> int:
    """Print everything that is known of a run before it starts; the exit code."""
    config, vocabulary = with_some_vocabulary(config)
    precision, device = _guess_device(config)
    final = final_config(config, given, Layout(mesh=Mesh(data=world_size), device=device, precision=precision))
    print("# run\n" + write_yaml(run_to_dict(config)))
    print("# final DeepSpeed config\n" + json.dumps(final, indent=2))
    print("\n# " + "\n# ".join(_summary(config, final, world_size, precision, device, vocabulary)))
    return 0


def _summary(
    config: RunConfig, final: Mapping[str, Any], world_size: int, precision: Precision, device: str, vocabulary: str
) -> list[str]:
    count = counts.parameter_count(config.model, config.context_length)
    stage = final["zero_optimization"]["stage"]
    fp32_gradients = final.get("data_types", {}).get("grad_accum_dtype") == "fp32"  # asked of 16-bit precisions only
    accumulation = final["gradient_accumulation_steps"]
    state = counts.model_state_bytes(count.total, stage, precision, world_size, fp32_gradients, accumulation)
    length, micro = config.data.sequence_length, config.train.micro_batch_sequences
    activations = counts.activation_bytes(config.model, length, config.train, precision, device)
    per_token = counts.flops_per_token(config.model, length)
    total_tokens = config.num_steps * config.tokens_per_step
    traffic = communication(config, final, precision)
    return [
        f"parameters   {count.total:,} ({count.embedding + count.head:,} of them embedding and head; {vocabulary})",
        f"layout       {world_size} ranks on {device}, ZeRO stage {stage}, {precision}",
        f"batch        {config.train.global_batch_sequences} sequences of {length} = {config.tokens_per_step:,} tokens a step: "
        f"{final['gradient_accumulation_steps']} micro-batches of {micro} on each rank",
        f"steps        {config.num_steps:,} for {total_tokens:,} tokens",
        f"compute      {per_token / 1e6:,.1f} MFLOP a token, {per_token * total_tokens:.3g} FLOP in all",
        f"memory       per rank {state / GIB:.2f} GiB of model states and about {activations / GIB:.2f} GiB of activations",
        *_offload_lines(final["zero_optimization"], count.total, precision, world_size),
        f"network      per rank and step {traffic.handed / 1e6:,.1f} MB given to collectives, "
        f"{traffic.on_wire(world_size) / 1e6:,.1f} MB sent",
        f"directories  run {config.run.directory}, data {config.data.directory}",
    ]


def _offload_lines(zero: Mapping[str, Any], num_parameters: int, precision: Precision, world_size: int) -> list[str]:
    """Where offload puts the model states; no line without offload."""
    if offload_devices(zero) == ("none", "none"):
        return []
    where = offloaded_bytes(zero, num_parameters, precision, world_size)
    return [
        f"offload      per rank {where.device / GIB:.2f} GiB of model states on the device, {where.host / GIB:.2f} GiB "
        f"in the host's memory, {where.nvme / GIB:.2f} GiB on NVMe"
    ]


def communication(config: RunConfig, final: Mapping[str, Any], precision: Precision) -> counts.Communication:
    """What a step of this run communicates, by formula."""
    zero, weight_width = final["zero_optimization"], 4 if precision.startswith("fp32") else 2
    sizes = counts.parameter_sizes(config.model, config.context_length)
    gathered = sum(sizes)
    if zero["stage"] == 3:
        gathered -= sum(size for size in sizes if size <= zero["stage3_param_persistence_threshold"])
        if gathered > max(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]):
            gathered *= 2  # let go after the forward pass, and gathered for the backward pass again
    return counts.communication_bytes(
        sum(sizes),
        zero["stage"],
        final["gradient_accumulation_steps"],
        gradient_width={"fp32": 4, "bf16": 2, "fp16": 2}.get(final.get("communication_data_type", ""), weight_width),
        weight_width=weight_width,
        gathered_per_micro_batch=gathered,
    )


def with_some_vocabulary(config: RunConfig) -> tuple[RunConfig, str]:
    """A vocabulary size to count with: the run's, the prepared tokenizer's, or what will be trained."""
    if config.model.vocab_size is not None:
        return config, "vocabulary as given"
    directory = Path(config.data.directory or "")
    if (directory / "manifest.json").is_file():
        size, origin = load_manifest(directory).tokenizer.vocab_size, f"vocabulary of {directory}"
    else:
        size, origin = config.tokenizer.vocab_size, "vocabulary as it will be trained; the data is not prepared yet"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size)), origin


def _guess_device(config: RunConfig) -> tuple[Precision, str]:
    """The device that this machine would train on, found without importing torch: NVIDIA's driver leaves a file."""
    device = "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"
    asked = config.train.precision
    if asked == "auto":
        return ("bf16" if device == "cuda" else "fp32_compute_bf16"), device
    return asked, device
