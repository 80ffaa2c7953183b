"""The run's optimizer: which parameters are updated alike, and torch's optimizer over these groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsllm.config.optimizer import AdamWConfig, OptimizerConfig
from dsllm.engine.wrappers.wrapper import STATE_TENSORS
from dsllm.parameters import ParameterTable

LEARNING_RATE_FACTOR = "learning_rate_factor"
"""Key of an optimizer group: what the schedule's learning rate is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class OptimizerGroup:
    """Parameters that share their settings in the update."""

    kind: str
    """The optimizer: the `kind` of train.optimizer."""
    names: tuple[str, ...]
    """Its parameters, in the model's order."""
    learning_rate_factor: float
    weight_decay: float
    """Decoupled decay per step, as a share of the learning rate."""
    state_tensors: tuple[str, ...]
    """Tensors that the optimizer keeps per parameter, by torch's names."""

    def as_torch(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Any]:
        """As an entry of torch's `param_groups`. DeepSpeed replaces the parameters and keeps the other keys."""
        return {
            "params": [parameters[name] for name in self.names],
            "weight_decay": self.weight_decay,
            LEARNING_RATE_FACTOR: self.learning_rate_factor,
            STATE_TENSORS: self.state_tensors,
            "kind": self.kind,
        }


def optimizer_groups(table: ParameterTable, config: OptimizerConfig) -> list[OptimizerGroup]:
    """The trainable parameters by decay and learning-rate factor; groups in the order of their first parameter."""
    names: dict[tuple[float, float], list[str]] = {}
    for row in table:
        if row.trainable:
            names.setdefault((row.weight_decay_factor, row.learning_rate_factor), []).append(row.name)
    return [
        OptimizerGroup(
            kind=config.kind,
            names=tuple(found),
            learning_rate_factor=learning_rate_factor,
            weight_decay=config.weight_decay * decay_factor,
            state_tensors=("exp_avg", "exp_avg_sq"),
        )
        for (decay_factor, learning_rate_factor), found in names.items()
    ]


def make_optimizer(model: torch.nn.Module, table: ParameterTable, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The run's optimizer over a model's trainable parameters."""
    parameters = dict(model.named_parameters())
    groups = [group.as_torch(parameters) for group in optimizer_groups(table, config)]
    return _adamw(groups, config)


def _adamw(groups: list[dict[str, Any]], config: AdamWConfig) -> torch.optim.AdamW:
    """torch's own AdamW: as fast as DeepSpeed's, nothing to compile, and the one that ZeRO was tested with."""
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """The schedule's learning rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[LEARNING_RATE_FACTOR]
