"""Many commands are followed as one: whole lines, true codes, one stop for all, the end in bounded time."""

import os
import signal
import threading
import time

import psutil
import pytest

from dsllm.launch import follow as module
from dsllm.launch.follow import StopRequest, Waits, follow, stop_signals

WAITS = Waits(save=10, end=10)
ECHO_WORDS = (
    "while read word; do echo got $word; [ $word = stop ] && exit 75; [ $word = end ] && exit 4; done; echo alone"
)


def run(commands: dict[str, str], stop: StopRequest | None = None, waits: Waits = WAITS, over: bool = False):
    lines: list[bytes] = []
    words = {host: ("bash", "-c", text) for host, text in commands.items()}
    codes = follow(words, waits, stop or StopRequest(), lambda: over, lines.append)
    return codes, b"".join(lines).decode().splitlines()


def test_lines_stay_whole_and_name_their_host():
    codes, lines = run({"n1": "echo -n a; sleep 0.2; echo b; echo -n c", "n2": "echo d >&2; exit 3"})
    assert codes["n2"] == 3 and sorted(lines) == ["n1: ab", "n1: c", "n2: d"]
    assert run({"localhost": "echo a"}) == ({"localhost": 0}, ["a"])


def test_a_stop_is_sent_to_every_host():
    codes, lines = run({"n1": ECHO_WORDS, "n2": ECHO_WORDS}, StopRequest(by=signal.SIGTERM))
    assert codes == {"n1": 75, "n2": 75} and "n1: got stop" in lines and "n2: got stop" in lines


def test_the_end_of_one_host_is_sent_to_the_others():
    codes, lines = run({"n1": "exit 1", "n2": ECHO_WORDS})
    assert codes == {"n1": 1, "n2": 4} and "n2: got end" in lines


def test_the_end_of_the_run_is_sent_to_a_launcher_that_hangs():
    assert run({"n1": ECHO_WORDS}, over=True)[0] == {"n1": 4}


def test_a_host_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.5)
    began = time.monotonic()
    codes, _ = run({"n1": "exit 1", "n2": "sleep 60"}, waits=Waits(save=0.1, end=0.1))
    assert codes == {"n1": 1, "n2": -signal.SIGKILL} and time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_our_own_signals_mean_stop(number):
    with stop_signals() as stop:
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        codes, _ = run({"n1": ECHO_WORDS}, stop)
    assert stop.by == number and codes == {"n1": 75}


def test_nothing_is_left_when_we_fail_ourselves():
    def broken(data: bytes) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        follow({"n1": ("bash", "-c", "echo x; exec sleep 60")}, WAITS, StopRequest(), lambda: False, broken)
    assert not [child for child in psutil.Process().children() if "sleep" in child.name()]
