"""The reference: plain PyTorch in one process, which knows neither DeepSpeed nor the engine's step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from dsllm.batches import MicroBatch
from dsllm.model.initial import fill_initial
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table
from dsllm.parity.combinations import Combination
from dsllm.parity.tiny_run import (
    CLIPPING,
    LOSS_SCALE_POWER,
    NUM_STEPS,
    OPTIMIZER,
    SEQUENCE_LENGTH,
    learning_rate,
    micro_batches,
    model_of,
)

WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""In the other precisions the layers see fp32 weights."""


@dataclass(frozen=True)
class Reference:
    """What the plain run left behind."""

    losses: list[float]
    """Mean over the counted tokens of each step's global batch, before the update."""
    norms: list[float]
    """Of each step's gradient, before clipping."""
    weights: dict[str, np.ndarray]
    """fp32 weights after the last step, flattened, by name."""
    way: float
    """||weights - initial weights||, all parameters together."""

    @property
    def weights_per_way(self) -> float:
        """||weights|| / way: the size of the weights, relative to how far training moved them."""
        return norm_of(self.weights) / self.way


def norm_of(tensors: Mapping[str, np.ndarray]) -> float:
    """Euclidean norm of all of them together, in fp64."""
    return math.sqrt(sum(float(np.sum(np.square(t, dtype=np.float64))) for t in tensors.values()))


def initial_weights(combination: Combination, seed: int, device: torch.device) -> Transformer:
    """A model of fp32 weights at their initial values."""
    with device:
        model = Transformer(model_of(combination), SEQUENCE_LENGTH)
    fill_initial(model, parameter_table(model_of(combination), SEQUENCE_LENGTH), seed)
    return model


def train_reference(combination: Combination, seed: int, device: torch.device) -> Reference:
    """Train the tiny run, one micro-batch after the other: fp32 weights, gradients summed in fp32, torch's own AdamW.

    The micro-batches are those of the ranks together, so that a matrix product in 16 bits rounds as it does there.
    """
    masters = initial_weights(combination, seed, device)
    model = initial_weights(combination, seed, device)
    if combination.precision == "fp32_compute_bf16":
        model.compute_dtype = torch.bfloat16
    model.to(WEIGHT_DTYPES.get(combination.precision, torch.float32))
    optimizer = _adamw(masters)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batches = [b for rank in range(combination.world_size) for b in micro_batches(combination, seed, step, rank)]
        losses.append(_gradients(model, masters, batches, combination))
        limit = CLIPPING if combination.clipping else math.inf
        norms.append(float(clip_grad_norm_(masters.parameters(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(model.parameters(), masters.parameters(), strict=True):
                weight.copy_(master)
    weights, first = _flat(masters), _flat(initial_weights(combination, seed, device))
    way = norm_of({name: weights[name] - first[name] for name in weights})
    return Reference(losses, norms, weights, way)


def _flat(model: Transformer) -> dict[str, np.ndarray]:
    return {name: p.detach().flatten().cpu().numpy() for name, p in model.named_parameters()}


def _adamw(masters: Transformer) -> torch.optim.AdamW:
    parameters = list(masters.parameters())
    groups = [  # by shape, without the parameter table that the engine reads
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.epsilon, foreach=False)


def _gradients(model: Transformer, masters: Transformer, batches: list[MicroBatch], combination: Combination) -> float:
    """Put the gradient of the mean loss over all counted tokens into the masters; returns that loss."""
    scale = 2.0**LOSS_SCALE_POWER if combination.precision == "fp16" else 1.0
    counted = sum(float(b.targets.numel() if b.weights is None else b.weights.sum()) for b in batches)
    device = next(model.parameters()).device
    total = 0.0
    for master in masters.parameters():
        master.grad = torch.zeros_like(master)
    for batch in batches:
        losses = model(batch.inputs.to(device), batch.targets.to(device)).losses  # [b, T]
        if batch.weights is not None:
            losses = losses * batch.weights.to(device)
        loss = losses.sum()
        (loss * (scale / counted)).backward()
        total += float(loss.detach())
        for weight, master in zip(model.parameters(), masters.parameters(), strict=True):
            assert weight.grad is not None and master.grad is not None, "every parameter takes part"
            master.grad += weight.grad.float() / scale
            weight.grad = None
    return total / counted
