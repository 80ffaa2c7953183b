"""Terminal output of rank 0; silenced once standard output is closed."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsllm.errors import OutputError

SECONDS_BETWEEN_STATUS = 0.2


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


class Output:
    """Standard output of a command whose result is what it prints.

    A reader that leaves (`dsllm generate | head`) is no error; a disk that is full is. Characters that the terminal's encoding
    does not have are replaced.
    """

    def __init__(self) -> None:
        self.reader_left = False
        """Whether printing is in vain."""
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")

    def __call__(self, text: str, end: str = "\n") -> None:
        """Print a text at once.

        Raises:
            OutputError: standard output cannot be written, for example because the disk behind it is full.
        """
        if self.reader_left:
            return
        try:
            print(text, end=end, flush=True)
        except BrokenPipeError:
            self.reader_left = True
            silence()
        except OSError as error:
            silence()
            raise OutputError(f"standard output: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what a command is doing, in one line on standard error that is gone afterwards.

    Does nothing where standard error is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    last = [0.0]

    def show(text: str) -> None:
        if time.monotonic() - last[0] >= SECONDS_BETWEEN_STATUS:
            last[0] = time.monotonic()
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
