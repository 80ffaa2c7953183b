"""A run's directory is held by one attempt, and its status is true however the attempt ends."""

import contextlib
from pathlib import Path

import pytest

from dsllm.engine.processes.process_group import World
from dsllm.errors import Interrupted, RunError
from dsllm.run_directory import LOCK_FILE, STATUS_FILE, lock_run, read_status, write_status
from dsllm.session.agreement import stop_together
from dsllm.session.directory import free_directory_state, held_directory
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_job import tree


class PlantedError(Exception):
    pass


def three_attempts(world: World, run: Path) -> list[tuple[int, str]]:
    """Attempt number and state inside each attempt: one that ends well, one that fails on rank 1, and one more."""
    found, lines = [], []
    for failing in (False, True, False):
        try:
            with held_directory(run, world, lines.append) as held:
                world.barrier()  # rank 0 has written it
                found.append((held.attempt, read_status(run)["state"]))
                world.barrier()
                if failing:
                    raise PlantedError("the reason")
                held.write_status("interrupted", step=7)
        except PlantedError:
            status = read_status(run) if world.rank == 0 else {}
            assert status.get("reason", "PlantedError: the reason") == "PlantedError: the reason"
            found.append((held.attempt, status.get("state", "failed")))
        world.barrier()
    assert not lines
    return found


def test_attempts_are_counted_and_a_failure_is_written_with_its_reason(tmp_path):
    expected = [(1, "running"), (2, "running"), (2, "failed"), (3, "running")]
    assert run_ranks(2, three_attempts, tmp_path / "run") == [expected, expected]
    status = read_status(tmp_path / "run")
    assert (status["state"], status["step"], status["attempt"]) == ("interrupted", 7, 3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [LOCK_FILE, STATUS_FILE]
    lock_run(tmp_path / "run", print).release()  # nobody holds it any more


def refusals(world: World, run: Path) -> list[str]:
    found = []
    with pytest.raises(RunError) as caught:
        free_directory_state(run, world)
    found.append(str(caught.value))
    with pytest.raises(RunError) as caught, held_directory(run, world, print):
        raise AssertionError("the directory is not free")
    return [*found, str(caught.value)]


def test_a_directory_that_is_held_is_refused_on_all_ranks(tmp_path):
    write_status(tmp_path, "running", attempt=4)
    lock = lock_run(tmp_path, print)
    before = tree(tmp_path)
    for found in run_ranks(2, refusals, tmp_path):
        assert len(found) == 2 and all("a run is alive here (process" in text for text in found)
    assert tree(tmp_path) == before
    lock.release()


def states(world: World, runs: list[Path]) -> list[str]:
    return [free_directory_state(run, world) for run in runs]


def test_the_state_of_a_free_directory_is_read_and_nothing_is_made(tmp_path):
    (tmp_path / "old").mkdir()
    write_status(tmp_path / "old", "interrupted")
    before = tree(tmp_path)
    assert run_ranks(2, states, [tmp_path / "absent", tmp_path / "old"]) == [["", "interrupted"]] * 2
    assert tree(tmp_path) == before


def hold_what_each_sees(world: World, runs: list[Path]) -> str:
    with pytest.raises(RunError) as caught, held_directory(runs[world.rank], world, print):
        raise AssertionError("the directory is not shared")
    return str(caught.value)


def test_a_directory_that_is_not_shared_is_refused_on_all_ranks(tmp_path):
    one, two = run_ranks(2, hold_what_each_sees, [tmp_path / "here", tmp_path / "elsewhere"])
    assert one.replace("here", "") == two.replace("elsewhere", "")
    assert "is not shared: rank 1 on " in one and "cannot see what rank 0 on" in one
    assert [p.name for p in (tmp_path / "here").iterdir()] == [LOCK_FILE], "no status, no probe"


def lose_the_lock(world: World, run: Path, what: str) -> list[str]:
    """Remove the lock or the whole directory under a run; what the run reports, or the error of a renewal."""
    lines: list[str] = []
    with contextlib.suppress(PlantedError), held_directory(run, world, lines.append, step=4) as held:
        if what == "lock":
            (run / LOCK_FILE).unlink()
        else:
            run.rename(run.with_name("elsewhere"))
        other = lock_run(run, print) if what == "taken" else None
        held.write_status("running", step=5)  # not before the lock is held again
        try:
            assert held.renew()
        except RunError as error:
            lines.append(str(error))
            assert other is not None
            raise PlantedError from error
        assert not held.renew(), "once is enough"
        held.write_status("interrupted", step=6)
        refused = pytest.raises(RunError, match="a run is alive here")
        with refused:
            lock_run(run, print)
    return lines


@pytest.mark.parametrize("what", ["lock", "directory"])
def test_a_removed_lock_is_taken_again(tmp_path, what):
    ((first, second),) = run_ranks(1, lose_the_lock, tmp_path / "run", what)
    assert "was not written (running): the run's lock is not there any more" in first
    assert "its lock was removed while the run was alive; it is locked again" in second
    assert read_status(tmp_path / "run")["step"] == 6


def test_a_directory_that_another_run_has_taken_is_left_to_it(tmp_path):
    (lines,) = run_ranks(1, lose_the_lock, tmp_path / "run", "taken")
    assert "the lock of this run was removed while it was alive, and now" in lines[1]
    assert "a run is alive here (process" in lines[1] and "saves nothing" in lines[1]
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK_FILE], "no status of the run that lost it"


def stopped(world: World, run: Path) -> str:
    with pytest.raises(Interrupted), held_directory(run, world, print, step=4, tokens=32):
        stop_together(world, lambda: "SIGTERM" if world.rank == 1 else "")
    return read_status(run)["state"] if world.rank == 0 else ""


def test_a_stop_of_one_rank_before_the_first_step_is_a_stop_of_all_and_no_failure(tmp_path):
    assert run_ranks(2, stopped, tmp_path)[0] == "interrupted"
    status = read_status(tmp_path)
    assert (status["step"], status["tokens"]) == (4, 32)
    assert status["reason"] == "another rank was asked to stop, before the first step"
