"""Initial values of the parameters: a function of (seed, name) only, so the same on every layout."""

import hashlib
import math

import torch
from torch import Tensor

from dsllm.config.model import ModelConfig


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, fp32.

    Norm weights are ones, biases zeros, matrices normal with `initial_std`; the two projections that write into the
    residual stream are scaled by 1 / sqrt(2 x num_layers) (GPT-2: Radford et al. 2019, section 2.3). Padding rows of
    the vocabulary are zeros, and the other rows do not depend on how many there are.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    std = config.initial_std
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    value = torch.zeros(shape)
    filled = value[: config.vocab_size] if name in ("embed.weight", "head.weight") else value
    filled.normal_(0.0, std, generator=_generator(name, seed))
    return value


def fill_initial(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter of an unpartitioned model its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
