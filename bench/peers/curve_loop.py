"""One run of bench/curves.py: trains a small model on the bench's corpus along one path, and writes its losses as JSON."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bench.peers.dsllm_engine import build
from bench.peers.models import PlainModel, copy_weights
from bench.workloads import Workload
from dsllm.batches import MicroBatch
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.device import set_up_process
from dsllm.engine.processes.process_group import process_group
from dsllm.engine.processes.ranks import discover_ranks
from dsllm.engine.step import take_step
from dsllm.objectives import TokenLoss

SHAPE = Workload(
    num_layers=3,
    hidden_size=128,
    num_heads=4,
    mlp_size=384,
    vocab_size=8192,
    sequence_length=128,
    global_batch_sequences=8,
    tied=True,
    learning_rate=1e-3,
)
WARM_UP_STEPS = 50
MEASURE_EVERY_STEPS = 25
CORPUS = Path("bench/data")

Step = Callable[[torch.Tensor, float], float]
"""Takes a step on tokens [b, T + 1] at a learning rate; returns the loss before it."""
Measure = Callable[[torch.Tensor], float]
"""The mean loss of tokens [b, T + 1]."""


def tokens_of(split: str) -> np.ndarray:
    """The tokens of one split of the corpus, one after the other."""
    return np.memmap(next(CORPUS.glob(f"{split}-*.bin")), dtype=np.uint16, mode="r")


def batches(seed: int, num_steps: int) -> Iterator[torch.Tensor]:
    """Windows of the training tokens, at places that the seed chooses."""
    tokens, draw, length = tokens_of("train"), np.random.default_rng(seed), SHAPE.sequence_length + 1
    for _ in range(num_steps):
        places = draw.integers(len(tokens) - length, size=SHAPE.global_batch_sequences)
        yield torch.from_numpy(np.stack([tokens[p : p + length] for p in places]).astype(np.int64))


def held_out() -> torch.Tensor:
    """The first 64 windows of the held-out tokens."""
    tokens, length = tokens_of("validation"), SHAPE.sequence_length + 1
    return torch.from_numpy(np.array(tokens[: 64 * length]).astype(np.int64)).view(64, length)


@contextlib.contextmanager
def dsllm_path(seed: int) -> Iterator[tuple[Step, Measure]]:
    """dsllm's engine and step."""
    set_up_process(1)
    with process_group(discover_ranks(), torch.device("cpu")) as world:
        engine = build(SHAPE, world, 0, "fp32_compute_bf16", seed)

        def step(tokens: torch.Tensor, learning_rate: float) -> float:
            set_learning_rate(engine.optimizer, learning_rate)
            return take_step(
                engine, [MicroBatch(inputs=tokens[:, :-1], targets=tokens[:, 1:])], TokenLoss(), seed=0
            ).loss

        yield step, lambda tokens: engine.module(tokens[:, :-1], tokens[:, 1:]).losses.mean().item()


@contextlib.contextmanager
def plain_path(seed: int, autocast: bool) -> Iterator[tuple[Step, Measure]]:
    """A PyTorch loop over the plain model, with dsllm's initial weights and the settings of its AdamW."""
    from bench.peers.models import dsllm_model

    start = dsllm_model(SHAPE, seed).model.state_dict()
    model = PlainModel(SHAPE)
    copy_weights(model, start)
    parameters = dict(model.named_parameters())
    decayed = [p for p in parameters.values() if p.ndim > 1]
    free = [p for p in parameters.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True
    )

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(tokens[:, :-1], tokens[:, 1:])

    def step(tokens: torch.Tensor, learning_rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SHAPE.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    yield step, lambda tokens: loss_of(tokens).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=("dsllm", "autocast", "fp32"), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    fast = options.path == "dsllm"
    path = dsllm_path(options.seed) if fast else plain_path(options.seed, options.path == "autocast")
    record: dict = {"path": options.path, "seed": options.seed, "losses": [], "steps": [], "held_out": []}
    windows = held_out()
    with path as (step, measure):
        for number, tokens in enumerate(batches(options.seed, options.steps), start=1):
            learning_rate = SHAPE.learning_rate * min(1.0, number / WARM_UP_STEPS)
            record["losses"].append(step(tokens, learning_rate))
            if number % MEASURE_EVERY_STEPS and number < options.steps:
                continue
            with torch.no_grad():
                record["held_out"].append(measure(windows))
            record["steps"].append(number)
    options.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
