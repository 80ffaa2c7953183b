"""Reading ahead changes nothing but time: same order, same bits, and every error at the step it belongs to."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from dsllm.batches import MicroBatch
from dsllm.data.manifest import Manifest
from dsllm.data.position import Position
from dsllm.data.prefetch import Prefetch
from dsllm.data.training import TrainingBatches
from dsllm.errors import DataError
from tests.helpers.training_data import G, at_step, data, training, two_sources

MICRO_BATCHES = 2
"""Of a rank in one step."""
SECONDS = 10.0
"""A thread that does not answer within this time hangs."""


class Watched:
    """Training batches that record which thread reads which step, and that can be blocked like a slow disk."""

    def __init__(self, batches: TrainingBatches):
        self.batches = batches
        self.positions: list[Position] = []
        self.threads: list[threading.Thread] = []
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def step(self, position: Position) -> list[MicroBatch]:
        self.positions.append(position)
        self.threads.append(threading.current_thread())
        assert self.may_read.wait(SECONDS)
        micro_batches = self.batches.step(position)
        self.tensors += [weakref.ref(batch.inputs) for batch in micro_batches]
        return micro_batches

    def steps_in_memory(self) -> float:
        return sum(tensor() is not None for tensor in self.tensors) / MICRO_BATCHES


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return two_sources(tmp_path)


@pytest.fixture
def batches(tmp_path: Path, manifest: Manifest) -> Watched:
    return Watched(training(tmp_path, manifest, data(a=None, b=None), rank=1, num_ranks=2, micro=2))


def contents(micro_batches: Sequence[MicroBatch]) -> list[tuple]:
    return [(batch.inputs.tolist(), batch.targets.tolist(), batch.fingerprint, batch.origin) for batch in micro_batches]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for the thread; fails if it does not get there."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_are_those_of_the_batches_bit_for_bit(batches: Watched, enabled: bool) -> None:
    position = Position().skipping([(13, 18)])
    with Prefetch(batches, enabled=enabled) as ahead:
        for _ in range(6):
            assert contents(ahead.step(position, position.after(G))) == contents(batches.batches.step(position))
            position = position.after(G)
    others = {thread for thread in batches.threads if thread is not threading.current_thread()}
    assert len(others) == (1 if enabled else 0), "one thread reads, and without prefetch none"


def test_a_run_that_goes_elsewhere_gets_what_it_asks_for(batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        for step, guess in ((0, 1), (5, 6), (2, 3), (2, None), (3, 3), (3, 4)):
            next_position = None if guess is None else at_step(guess)
            found = ahead.step(at_step(step), next_position)
            assert contents(found) == contents(batches.batches.step(at_step(step)))


def test_the_next_step_is_read_while_this_one_computes(batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        ahead.step(at_step(0), at_step(1))
        wait_until(lambda: len(batches.tensors) == 2 * MICRO_BATCHES)
        assert batches.positions == [at_step(0), at_step(1)]


def test_a_read_that_blocks_holds_up_only_the_step_that_needs_it(batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        ahead.step(at_step(0), at_step(1))
        wait_until(lambda: len(batches.tensors) == 2 * MICRO_BATCHES)
        batches.may_read.clear()
        first = ahead.step(at_step(1), at_step(2))
        assert contents(first) == contents(batches.batches.step(at_step(1)))
        wait_until(lambda: batches.positions[-1] == at_step(2))
        threading.Timer(0.2, batches.may_read.set).start()
        began = time.monotonic()
        second = ahead.step(at_step(2), None)
        assert time.monotonic() - began > 0.1, "the caller sees the time that it waits for data"
        assert contents(second) == contents(batches.batches.step(at_step(2)))


def test_nothing_is_read_after_the_last_step(batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        ahead.step(at_step(0), at_step(1))
        ahead.step(at_step(1), None)
    assert batches.positions == [at_step(0), at_step(1)]


def test_at_most_two_steps_are_in_memory(batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        for step in range(5):
            micro_batches = ahead.step(at_step(step), at_step(step + 1))
            wait_until(lambda step=step: len(batches.tensors) == (step + 2) * MICRO_BATCHES)
            assert batches.steps_in_memory() == 2
            assert batches.positions[-1] == at_step(step + 1), "one step ahead, not more"
            assert len(micro_batches) == MICRO_BATCHES
        del micro_batches
    wait_until(lambda: batches.steps_in_memory() == 0)


def break_shards(directory: Path) -> None:
    """Empty the shards under the open loaders, so that every later read fails."""
    for path in directory.glob("train-*.bin"):
        os.truncate(path, 0)


def test_an_error_is_raised_by_the_step_it_belongs_to(tmp_path: Path, batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        ahead.step(at_step(0), at_step(1))
        wait_until(lambda: len(batches.tensors) == 2 * MICRO_BATCHES)
        break_shards(tmp_path)
        assert len(ahead.step(at_step(1), at_step(2))) == MICRO_BATCHES, "it was read before the shards broke"
        for _ in range(2):
            with pytest.raises(DataError, match="ends at token"):
                ahead.step(at_step(2), at_step(3))


def test_an_error_of_a_step_that_is_not_asked_for_is_not_raised(tmp_path: Path, batches: Watched) -> None:
    with Prefetch(batches) as ahead:
        ahead.step(at_step(0), at_step(1))
        wait_until(lambda: len(batches.tensors) == 2 * MICRO_BATCHES)
        break_shards(tmp_path)
        ahead.step(at_step(1), at_step(2))
        wait_until(lambda: batches.positions[-1] == at_step(2))


def test_errors_that_are_not_ours_keep_their_type(batches: Watched) -> None:
    class Broken:
        def step(self, position: Position) -> list[MicroBatch]:
            raise MemoryError(str(position.next_sample))

    with Prefetch(Broken()) as ahead, pytest.raises(MemoryError, match="16"):
        ahead.step(at_step(2), None)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_thread_is_left(batches: Watched, error: type[BaseException] | None) -> None:
    before = set(threading.enumerate())

    def run() -> None:
        with Prefetch(batches) as ahead:
            ahead.step(at_step(0), at_step(1))
            assert set(threading.enumerate()) > before
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert set(threading.enumerate()) == before


SLOW = """
import os, sys, time
from dsllm.data.position import Position
from dsllm.data.prefetch import Prefetch

class Slow:
    def step(self, position):
        print("reading", position.next_sample, flush=True)
        time.sleep(position.next_sample)
        return []

"""
INTERRUPTED = """
with Prefetch(Slow()) as ahead:
    ahead.step(Position(0), Position(1))
    while True:  # a signal that comes just before one long sleep would be handled after it
        time.sleep(0.05)
"""
FORKED = """
with Prefetch(Slow()) as ahead:
    ahead.step(Position(0), None)
child = os.fork()
with Prefetch(Slow()) as ahead:
    ahead.step(Position(0), Position(0))
    ahead.step(Position(0), None)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_ctrl_c_while_the_thread_reads_ends_the_process_cleanly() -> None:
    command = [sys.executable, "-c", SLOW + INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"reading 0\n", b"reading 1\n"]
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGINT
    assert shown.rstrip().endswith(b"KeyboardInterrupt") and b"Fatal" not in shown


@pytest.mark.slow
def test_it_works_before_and_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW + FORKED], timeout=6 * SECONDS, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.count(b"reading") == 5, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_tensors_have_the_same_content(batches: Watched) -> None:
    with Prefetch(batches, pin=True) as ahead:
        for step in range(3):
            found = ahead.step(at_step(step), at_step(step + 1))
            assert all(batch.inputs.is_pinned() and batch.targets.is_pinned() for batch in found)
            assert contents(found) == contents(batches.batches.step(at_step(step)))
