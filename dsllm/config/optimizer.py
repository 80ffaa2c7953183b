"""The optimizer of a run, tagged by its kind."""

from dataclasses import dataclass
from typing import Literal

from dsllm.config.fields import STRICT_FIELDS


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019), with decay on matrices and embeddings only."""

    __pydantic_config__ = STRICT_FIELDS

    kind: Literal["adamw"] = "adamw"
    """The optimizer. adamw is the only one yet."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment, per step."""
    beta2: float = 0.95
    """Decay of the second moment, per step."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, as a share of the learning rate per step; norms and biases are not decayed."""


OptimizerConfig = AdamWConfig
"""One class per kind; becomes a union tagged by `kind` with the second one."""
