"""The whole run as one typed, frozen value."""

from dataclasses import dataclass, field

from dsllm.config.data import DataConfig, TokenizerConfig
from dsllm.config.fields import STRICT_FIELDS, changeable
from dsllm.config.model import ModelConfig
from dsllm.config.parallel import ParallelConfig
from dsllm.config.train import CheckpointConfig, LogConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Name, folder and seed of the run."""

    __pydantic_config__ = STRICT_FIELDS

    name: str
    """Name of the run. Left out: the name of the YAML file."""
    directory: str = changeable("")
    """Folder of the run. Empty (default): runs/NAME."""
    seed: int = 1234
    """Decides the initial weights, the order of the data and dropout."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: what it computes, and how it is executed."""

    __pydantic_config__ = STRICT_FIELDS

    run: RunSection
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: str = changeable("ds_configs/zero1.json")
    """DeepSpeed JSON: ZeRO, offload and communication. Batch sizes, precision, clipping, optimizer and schedule belong to
    the run."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.train.global_batch_sequences * self.data.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run: the token budget, rounded up to whole steps."""
        return -(-self.train.total_tokens // self.tokens_per_step)

    def steps_of(self, steps: int | None, tokens: int | None, default: int) -> int:
        """A length in steps: given in steps, or in tokens and rounded up, or else the default."""
        if steps is not None:
            return steps
        return default if tokens is None else -(-tokens // self.tokens_per_step)

    @property
    def context_length(self) -> int:
        """Longest sequence that the model is made for, in tokens."""
        return self.model.context_length or self.data.sequence_length
