"""What a long command says on the terminal: by rank 0 alone, and into nothing once nobody listens any more."""

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Terminal:
    """Call it with a line to say. A reader that leaves (`dsllm train | head`) must not cost a run its state."""

    speaks: bool = True
    """False on the other ranks."""

    def __call__(self, text: str) -> None:
        if not self.speaks:
            return
        try:
            print(text, flush=True)
        except OSError:  # the pipe is closed, or its disk is full
            silence()


def silence() -> None:
    """Let standard output go nowhere from now on: what is still in its buffer would fail again at every write."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
