"""Signals are noted while a run trains, and end the process as usual before and after."""

import os
import signal
import subprocess
import sys

import pytest

from dsllm.train.interrupt import SIGNALS, stop_signals
from tests.helpers.launched import ROOT


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_by_name_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.reason == number.name
        os.kill(os.getpid(), number)  # launchers send signals twice
        assert stop.requested()
    assert signal.getsignal(number) == before


def test_after_the_block_a_signal_ends_the_process():
    code = (
        "from dsllm.train.interrupt import stop_signals; import os\nwith stop_signals(): pass\nos.kill(os.getpid(), 15)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGTERM


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


ORPHAN = """
import sys, time
from dsllm.train.interrupt import stop_signals
with stop_signals() as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + 20
    while not stop.requested() and time.monotonic() < deadline:
        time.sleep(0.01)
    open(sys.argv[1], "w").write(stop.reason)
"""


def test_a_launcher_that_is_gone_is_a_reason_to_stop(tmp_path):
    launcher, found = tmp_path / "torchrun", tmp_path / "found"
    rank = [sys.executable, "-c", ORPHAN, str(found)]
    launcher.write_text(f"import subprocess\nsubprocess.run({rank!r})\n")
    with subprocess.Popen([sys.executable, str(launcher)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
        process.stdout.read()  # until the rank, which has the other end, is gone too
    assert found.read_text() == "the launcher is gone"
