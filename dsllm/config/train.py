"""The training branch of a run: how many tokens, in what batches, precision, optimizer and schedule."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from dsllm.config.fields import STRICT_FIELDS, changeable
from dsllm.config.optimizer import AdamWConfig, OptimizerConfig

Precision = Literal["fp32", "fp32_compute_bf16", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ActivationCheckpointing = Literal["none", "full", "attention", "mlp"] | int
Kernels = Literal["torch", "liger"]
DeviceType = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then a shape down to end_ratio x peak."""

    __pydantic_config__ = STRICT_FIELDS

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine and linear decay from the warm-up's end to the last step; wsd stays at the peak and decays linearly at the
    end (warm-up, stable, decay); constant stays at the peak."""
    warmup_steps: int | None = None
    """Optimizer steps of warm-up; give this or warmup_tokens. None (default) for both: no warm-up."""
    warmup_tokens: int | None = None
    """Tokens of warm-up, rounded up to whole steps. None (default): see warmup_steps."""
    decay_steps: int | None = None
    """wsd: optimizer steps of the final decay; give this or decay_tokens. None (default) for both: a tenth of the run."""
    decay_tokens: int | None = None
    """wsd: tokens of the final decay, rounded up to whole steps. None (default): see decay_steps."""
    end_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """Scaling of the loss in fp16, so that small gradients do not vanish; not used by the other precisions."""

    __pydantic_config__ = STRICT_FIELDS

    static: float = 0.0
    """A fixed scale; 0: dynamic."""
    initial_power: int = 16
    """Dynamic: start at 2 to this power."""
    window_steps: int = 1000
    """Dynamic: double the scale after this many steps without overflow."""
    hysteresis: int = 2
    """Dynamic: halve the scale from this many overflows on, counted since it last grew."""
    minimum: float = 1.0
    """Dynamic: the lowest scale."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; the same on any number of ranks."""

    __pydantic_config__ = STRICT_FIELDS

    total_tokens: int = changeable(10_000_000)
    """Token budget of the run; rounded up to whole steps."""
    global_batch_sequences: int = 32
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch_sequences: int = changeable(4)
    """Sequences per rank and forward pass; gradient accumulation follows from it."""
    precision: Literal["auto", "fp32", "fp32_compute_bf16", "bf16", "fp16"] = "auto"
    """fp32; fp32_compute_bf16: fp32 parameters, bf16 inside the layers; bf16, fp16: DeepSpeed's, with fp32 masters.
    auto: bf16 on GPUs, fp32_compute_bf16 on CPU."""
    device: DeviceType = changeable("auto")
    """Where the run trains: cuda demands a GPU, and the run is refused where there is none; cpu uses none. auto: a GPU where
    torch sees one, else the CPU. With --dry-run: the device to plan for, on any machine."""
    gradient_clipping: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it; 0: off."""
    activation_checkpointing: ActivationCheckpointing = changeable("none")
    """none; full: keep only each block's input and compute the rest again in the backward pass; attention, mlp: the same
    for that branch of each block and its norm; k: full for every k-th block. Less memory, more work, the same numbers."""
    activation_offload: bool = changeable(False)
    """Keep in the CPU's memory what activation checkpointing keeps for the backward pass. Saves memory on GPUs only."""
    compile: bool = changeable(False)
    """Compile each layer with torch.compile; the first step takes longer, so it pays in long runs only."""
    kernels: Kernels = changeable("torch")
    """Kernels of norms and MLP: torch's, or Liger's (Triton; GPUs only, needs the extra `gpu`)."""
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    timeout_minutes: float = changeable(30.0)
    """Longest wait for another rank, at the start and in every step; after it, a rank that hangs or whose host is lost ends
    the run. Make it longer than the slowest save or validation."""
    bind_cores: bool | None = changeable(None)
    """Bind each rank to its share of the host's cores, unless the launcher has bound it. None (default): only on hosts
    with several memory nodes (NUMA) and several ranks."""
    validate_every_steps: int = changeable(0)
    """Measure the validation loss every so many steps; 0: only at the end."""
    validation_sequences: int = changeable(256)
    """At most this many held-out sequences per validation; 0: all of them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is saved, and which checkpoints are kept."""

    __pydantic_config__ = STRICT_FIELDS

    every_steps: int = changeable(500)
    """Save every so many steps; 0: not by steps. The end of the run and an interrupt always save."""
    every_minutes: float = changeable(0.0)
    """Save when this many minutes have passed since the last save; 0: not by time."""
    keep_last: int = changeable(2)
    """How many of the newest checkpoints to keep."""
    keep_every_steps: int = changeable(0)
    """Never remove a checkpoint whose step is a multiple of this; 0: no such exception."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported during the run."""

    __pydantic_config__ = STRICT_FIELDS

    every_steps: int = changeable(10)
    """A line on the terminal every so many steps; metrics.jsonl has every step."""
    tensorboard: bool = changeable(True)
    """Write TensorBoard event files into the run directory."""
    peak_tflops: float | None = changeable(None)
    """Peak of one device, in TFLOP/s, against which MFU is reported. None (default): from the data sheet on known
    GPUs, measured at the start on CPUs."""
    breakdown: bool | None = changeable(None)
    """Seconds of data, forward, backward, communication and optimizer in every row of metrics.jsonl, and a table at the
    end. Slows the step on GPUs, because every part waits for the device. None (default): on CPUs only, where it is cheap."""
    layer_statistics_every_steps: int = changeable(0)
    """Activations, gradient norm, weight norm and update of every layer, every so many steps, into
    layer_statistics.jsonl; 0: never."""
