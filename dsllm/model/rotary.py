"""Rotary positions (RoPE: Su et al. 2021): pairs of a head's entries turn by angles proportional to the position."""

# B sequences, T tokens, D width of a head, W rotated part of it.

import math
from typing import Any

import torch
from torch import Tensor

from dsllm.config.model import ModelConfig


def rotary_frequencies(config: ModelConfig, width: int) -> Tensor:
    """Radians per position of each rotated pair, fp32 [width / 2], with Llama 3's scaling if the config has it.

    The operations and their order are those of Llama and GPT-NeoX: at large positions the last bits of a frequency count.
    """
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # in the original context
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = ((turns - scaling.low_frequency_factor) / span).clamp(0, 1)  # 1: unchanged; 0: stretched by the whole factor
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class RotaryTable:
    """Cosines and sines of the angles per position, computed when first needed.

    A plain object, because DeepSpeed casts a module's buffers to bf16, in which positions above 256 coincide.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.width = 2 * int(config.head_width * config.rope_fraction / 2)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def at(self, start: int, stop: int, like: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for `rotate`, on the device and in the dtype of `like`.

        Args:
            positions: [B, T], all below stop, on the device of `like`; None (default): start to stop - 1
        Returns:
            each [stop - start, W], or [B, T, W] with positions
        """
        key = (like.device, like.dtype)
        if key not in self._tables or len(self._tables[key][0]) < stop:
            angles = torch.outer(torch.arange(stop, dtype=torch.float32), rotary_frequencies(self.config, self.width))
            cosines, sines = angles.cos(), angles.sin()
            table = torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
            self._tables[key] = table[0].to(like), table[1].to(like)
        cosines, sines = self._tables[key]
        if positions is None:
            return cosines[start:stop], sines[start:stop]
        return cosines[positions], sines[positions]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + W/2) of the first W entries of each head, and put the heads before the tokens.

    Args:
        x: [B, T, heads, D]
        cosines, sines: [T, W] or [B, T, W], from `RotaryTable`
    Returns:
        [B, heads, T, D]
    """
    return _Rotate.apply(x, cosines, sines)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        x = x.transpose(1, 2)
        # The CPU's attention kernel for bf16 needs the heads first in memory too. The others return their output in the
        # memory order of their queries: token by token, the projection that follows needs no copy of it.
        heads_first = x.device.type == "cpu" and x.dtype == torch.bfloat16
        out = _empty(x) if heads_first else torch.empty_like(x)
        return _turned(x, cosines.unsqueeze(-3), sines.unsqueeze(-3), out)  # [1 or B, 1, T, W]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        return _turned(grad, cosines.unsqueeze(-2), -sines.unsqueeze(-2), _empty(grad)), None, None  # [T, 1, W]


def _empty(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape, whatever the strides of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, out: Tensor) -> Tensor:
    """x * cosines + (x with the halves of its rotated part swapped) * sines, written into out."""
    width = cosines.shape[-1]
    half = width // 2
    out[..., :half] = x[..., half:width]
    out[..., half:width] = x[..., :half]
    out[..., :width].mul_(sines).addcmul_(x[..., :width], cosines)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    return out
