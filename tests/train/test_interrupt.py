"""Signals are noted while a run trains, and end the process as usual before and after."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsllm.errors import EXIT_FORCED
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


HEARD = """
import os, signal, sys, threading, time
from dsllm.train.interrupt import stop_signals
from dsllm.errors import Interrupted

def say(text):
    print(text, flush=True)

with stop_signals(say) as stop:
    {body}
"""


def heard(body: str, *numbers: int, pause: float = 0.5) -> tuple[int, list[str]]:
    """Run Python code inside `stop_signals` and send signals once it says ready; its exit code and lines."""
    command = [sys.executable, "-c", HEARD.format(body=body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(pause)
        lines = process.stdout.read().splitlines()
    return process.returncode, lines


IN_A_LONG_CALL = """
    stop.begin_steps(lambda: say("last words"))
    import ctypes; say("ready")
    end = time.monotonic() + 3
    while time.monotonic() < end: ctypes.CDLL(None).sleep(3)
    say(stop.reason)
"""
"""The main thread is in C code, as in a collective: Python's handlers wait for it."""


@pytest.mark.slow
def test_the_first_ctrl_c_is_answered_at_once_and_the_second_ends_the_process():
    code, lines = heard(IN_A_LONG_CALL, signal.SIGINT, signal.SIGINT)
    assert code == EXIT_FORCED
    assert lines == [
        "SIGINT: the run stops after this step and saves; a second Ctrl-C ends it at once, without saving",
        "last words",
        "SIGINT again: ended at once; nothing was saved since the newest checkpoint",
    ]


@pytest.mark.slow
def test_one_ctrl_c_that_arrives_twice_is_one():
    code, lines = heard(IN_A_LONG_CALL, signal.SIGINT, signal.SIGINT, pause=0.01)
    assert code == 0 and lines[-1] == "SIGINT" and len(lines) == 2


@pytest.mark.slow
def test_other_signals_force_nothing():
    code, lines = heard(IN_A_LONG_CALL, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, pause=0.3)
    assert code == 0 and lines == ["SIGTERM: the run stops after this step and saves", "SIGTERM"]


@pytest.mark.slow
def test_before_the_first_step_a_signal_raises_where_it_may():
    body = """
    try:
        stop.raise_at_once(True); say("ready"); time.sleep(20)
    except Interrupted as error:
        say(f"raised {error}"); time.sleep(0.6)  # the second signal does not disturb the end
        say(stop.why())
    """
    code, lines = heard(body, signal.SIGTERM, signal.SIGTERM, pause=0.2)
    assert code == 0 and lines == ["raised SIGTERM", "SIGTERM"]
    body = """
    say("ready")
    while not stop.reason: time.sleep(0.01)
    try: stop.raise_at_once(True)
    except Interrupted as error: say(f"raised {error}")
    """
    code, lines = heard(body, signal.SIGHUP)
    assert code == 0 and sorted(lines) == ["SIGHUP: the run stops before its first step", "raised SIGHUP"]


def test_a_forked_child_has_the_plain_signals():
    body = """
    child = os.fork()
    if not child: time.sleep(20); os._exit(0)
    say("ready"); time.sleep(0.3); os.kill(child, signal.SIGTERM)
    say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])); time.sleep(0.3); say(repr(stop.reason))
    """
    assert heard(body) == (0, ["-15", "''"])


def test_outside_the_main_thread_there_are_no_handlers():
    found = []

    def use() -> None:
        with stop_signals() as stop:
            found.append(stop.requested())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [False]
