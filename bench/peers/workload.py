"""What every candidate does: the shape of the model, the batch, and the line that announces a finished step."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """Workload (a): Llama-shaped, 20.45 M parameters, 2048 tokens a step."""

    num_layers: int = 8
    hidden_size: int = 384
    num_heads: int = 6
    mlp_size: int = 1024
    vocab_size: int = 8192
    sequence_length: int = 512
    global_batch_sequences: int = 4
    learning_rate: float = 3e-4
    gradient_clipping: float = 1.0

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences per rank and step."""
        return self.global_batch_sequences // world_size()


def world_size() -> int:
    """Number of ranks, as torchrun and deepspeed tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among the ranks."""
    return int(os.environ.get("RANK", "0"))


def random_sequences(workload: Workload, num_sequences: int) -> torch.Tensor:
    """Token ids [num_sequences, sequence_length + 1]; made up, so that no candidate waits for a disk."""
    generator = torch.Generator().manual_seed(1234 + rank())
    return torch.randint(workload.vocab_size, (num_sequences, workload.sequence_length + 1), generator=generator)


def announce(step: int, loss: float) -> None:
    """The line that the bench waits for."""
    if rank() == 0:
        print(f"step {step} loss {loss:.4f}", flush=True)
