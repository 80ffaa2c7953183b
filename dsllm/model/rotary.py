"""Rotary positions (RoPE: Su et al. 2021): pairs of a head's entries turn by angles proportional to the position."""

# B sequences, T tokens, D width of a head, W rotated part of it.

import math
from typing import Any

import torch
from torch import Tensor

from dsllm.config.model import ModelConfig


def rotary_frequencies(config: ModelConfig, width: int) -> Tensor:
    """Radians per position of each rotated pair, fp32 [width / 2], stretched as in Llama 3 where the config says so.

    Computed in fp32 in the order in which Llama and GPT-NeoX do: at large positions the last bits of a frequency count.
    """
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # in the context before the stretching
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = ((turns - scaling.low_frequency_factor) / span).clamp(0, 1)  # 1: as it was; 0: stretched by the whole factor
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class RotaryTable:
    """Cosines and sines of the angles per position, made when first needed.

    A plain object and not a module with buffers: DeepSpeed casts buffers to bf16, in which positions past 256 collide.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.width = 2 * int(config.head_width * config.rope_fraction / 2)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def at(self, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [stop - start, W] for `rotate`, on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key not in self._tables or len(self._tables[key][0]) < stop:
            positions = torch.arange(stop, dtype=torch.float32)
            angles = torch.outer(positions, rotary_frequencies(self.config, self.width))
            cosines, sines = angles.cos(), angles.sin()
            table = torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
            self._tables[key] = table[0].to(like), table[1].to(like)
        return self._tables[key][0][start:stop], self._tables[key][1][start:stop]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + W/2) of the first W entries of each head, and put the heads before the tokens.

    Args:
        x: [B, T, heads, D]
        cosines, sines: [T, W], from `RotaryTable`
    Returns:
        [B, heads, T, D]
    """
    return _Rotate.apply(x, cosines, sines)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        x = x.transpose(1, 2)
        # The CPU's kernel for bf16 wants the heads first in memory too. The others give their output as they get their
        # queries: token by token, it need not be copied, and kept twice, for the projection that follows.
        heads_first = x.device.type == "cpu" and x.dtype == torch.bfloat16
        return _turned(x, cosines, sines, _empty(x) if heads_first else torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        return _turned(grad, cosines[:, None], -sines[:, None], _empty(grad)), None, None


def _empty(x: Tensor) -> Tensor:
    """Of x's shape and contiguous, however x lies in memory."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, out: Tensor) -> Tensor:
    """x * cosines + (x with the halves of its rotated part swapped) * sines, written to out."""
    width = cosines.shape[-1]
    half = width // 2
    out[..., :half] = x[..., half:width]
    out[..., half:width] = x[..., :half]
    out[..., :width].mul_(sines).addcmul_(x[..., :width], cosines)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    return out
