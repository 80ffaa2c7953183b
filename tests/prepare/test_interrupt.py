"""Signals that end a job interrupt, those that are ignored stay ignored, and afterwards all is as before."""

import os
import signal
import threading

import pytest

from dsllm.prepare.interrupt import interrupted_by_signals

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_interrupts(number: signal.Signals):
    before = [signal.getsignal(other) for other in NUMBERS]
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        os.kill(os.getpid(), number)
    assert [signal.getsignal(other) for other in NUMBERS] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_of_the_caller_stays():
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_other_threads_cannot_catch_signals_and_work_all_the_same():
    done: list[bool] = []

    def work() -> None:
        with interrupted_by_signals():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
