"""Shared by the peers: their command line, made-up tokens, the device, and the line that announces a finished step."""

import argparse
import os

import torch

from bench.workloads import WORKLOADS, Workload


def command_line(purpose: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every peer has."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    return parser


def world_size() -> int:
    """Number of ranks, as torchrun and deepspeed set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among the ranks."""
    return int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    """This rank's GPU, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    return chosen


def backend() -> str:
    """The backend of the process group."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def micro_batch(shape: Workload) -> int:
    """Sequences per rank and step."""
    return shape.global_batch_sequences // world_size()


def random_sequences(shape: Workload, num_sequences: int) -> torch.Tensor:
    """Token ids [num_sequences, sequence_length + 1]; made up, so that no candidate waits for a disk."""
    generator = torch.Generator().manual_seed(1234 + rank())
    return torch.randint(shape.vocab_size, (num_sequences, shape.sequence_length + 1), generator=generator)


def batches(shape: Workload) -> list[torch.Tensor]:
    """16 micro-batches [b, sequence_length + 1] of this rank, on its device."""
    size = micro_batch(shape)
    return list(random_sequences(shape, 16 * size).to(device()).split(size))


def announce(step: int, loss: float = float("nan")) -> None:
    """Print the line that the bench waits for; on a GPU, after the step's work there is done."""
    memory = ""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        memory = f"  {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    if rank() == 0:
        print(f"step {step}  loss {loss:.4f}{memory}", flush=True)
