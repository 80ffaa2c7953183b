"""With this folder on PYTHONPATH, SIGUSR2 makes a process fail by an error of its own, wherever it is at that moment."""

import signal
import types


def fail(number: int, frame: types.FrameType | None) -> None:
    """What a bug or a broken device would do."""
    raise MemoryError("made to fail by the test")


signal.signal(signal.SIGUSR2, fail)
