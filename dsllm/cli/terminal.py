"""Terminal output of rank 0; silenced once standard output is closed."""

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Terminal:
    """Call it with a line to print. A reader that leaves (`dsllm train | head`) does not end the run."""

    speaks: bool = True
    """False on the other ranks."""

    def __call__(self, text: str) -> None:
        if not self.speaks:
            return
        try:
            print(text, flush=True)
        except OSError:  # the pipe is closed, or the disk behind it is full
            silence()


def silence() -> None:
    """Send standard output to /dev/null from now on: what its buffer still holds would fail again at every write."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
