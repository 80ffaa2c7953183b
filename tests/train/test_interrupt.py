"""A signal or the end of the launcher is recorded as the reason to stop; afterwards signals act as before."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from dsllm.engine.processes.launcher import Launcher
from dsllm.train.interrupt import SIGNALS, Stop, stop_signals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_recorded_and_the_process_lives(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_signals() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.reason == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_the_end_of_the_launcher_is_a_reason() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stop = Stop(launcher=Launcher((psutil.Process(process.pid),)))
    assert not stop.requested()
    process.communicate()
    assert stop.requested() and stop.reason == "the launcher is gone"


def test_a_signal_counts_for_more_than_a_launcher_that_has_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    gone = Launcher((psutil.Process(process.pid),))
    process.wait()
    assert Stop("SIGTERM", gone).requested() and Stop("SIGTERM", gone).reason == "SIGTERM"
