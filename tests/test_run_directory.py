"""The run directory: one live run, a true status, metrics that survive a kill."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from dsllm.errors import RunError
from dsllm.run_directory import (
    METRICS_FILE,
    STATUS_FILE,
    check_shared,
    is_locked,
    last_attempt,
    lock_run,
    read_status,
    refuse_live_run,
    state_interrupted,
    status_or_nothing,
    write_status,
)
from dsllm.train.picture import draw_loss_curve, read_metrics
from tests.helpers.flock import UNSUPPORTED, run_with_flock


def test_a_live_run_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    imports = "from pathlib import Path; from dsllm.run_directory import lock_run"
    code = f"{imports}; lock = lock_run(Path({str(tmp_path)!r}), print); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"a run is alive here .process {holder.pid} on"):
            lock_run(tmp_path, print)
        holder.kill()
        holder.wait()
    lock_run(tmp_path, print).release()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used"):
        lock_run(tmp_path / "file" / "run", print)


def test_status_is_read_back_and_other_versions_are_refused(tmp_path):
    assert read_status(tmp_path) == {}
    write_status(tmp_path, "running", step=3)
    assert read_status(tmp_path)["state"] == "running" and read_status(tmp_path)["step"] == 3
    (tmp_path / "status.json").write_text('{"format_version": 9}')
    with pytest.raises(RunError, match="format version 9"):
        read_status(tmp_path)


def test_a_directory_that_is_not_shared_names_the_blind_ranks(tmp_path):
    answers = iter([["123", "0"], [(True, "h0"), (False, "h1")]])
    with pytest.raises(RunError, match="rank 1 on h1 cannot see what rank 0 on h0 wrote"):
        check_shared(tmp_path, 1, lambda value: next(answers))


def test_later_rows_win_and_a_cut_line_is_left_out(tmp_path):
    rows = [{"step": s, "tokens": 8 * s, "loss": 5.0 - s} for s in (1, 2, 3, 4)]
    again = [{"step": s, "tokens": 8 * s, "loss": 2.0 - s} for s in (3, 4, 5)]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 5, "tok\n' + "\n".join(map(json.dumps, again)) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        (1, 4.0),
        (2, 3.0),
        (3, -1.0),
        (4, -2.0),
        (5, -3.0),
    ]
    picture = draw_loss_curve(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


DAMAGED = {
    "empty": b"", "half": b'{"format_version": 1, "sta', "null": b"null", "a list": b"[1]", "no fields": b"{}",
    "zeros": bytes(200), "not UTF-8": b"\xff\xfe", "deep": b"[" * 10**5, "a number": b"7",
    "an odd version": b'{"format_version": "1"}', "NaN": b'{"format_version": NaN}', "huge": b" " * 2**21 + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_status_is_reported_and_blocks_nothing(tmp_path, content):
    (tmp_path / STATUS_FILE).write_bytes(content)
    lines: list[str] = []
    assert status_or_nothing(tmp_path, lines.append) == {}
    (line,) = lines
    assert line.startswith(f"{tmp_path / STATUS_FILE}: is not readable: ") and line.endswith("how far the run is")
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "attempt": 4}\n{"step": 2, "attempt": "x"}\n{"step": 3}\n')
    assert last_attempt(tmp_path) == 4
    state_interrupted(tmp_path, "SIGTERM")
    assert (tmp_path / STATUS_FILE).read_bytes() == content
    write_status(tmp_path, "running")
    assert read_status(tmp_path)["state"] == "running"


def test_a_status_whose_attempt_is_no_number_counts_none(tmp_path):
    write_status(tmp_path, "failed", attempt="many")
    assert last_attempt(tmp_path) == 0
    write_status(tmp_path, "failed", attempt=3)
    (tmp_path / METRICS_FILE).mkdir()
    assert last_attempt(tmp_path) == 3


def test_a_stopped_attempt_corrects_the_status_of_a_killed_run_and_no_other(tmp_path):
    write_status(tmp_path, "running", attempt=3, step=8)
    state_interrupted(tmp_path, "SIGTERM")
    status = read_status(tmp_path)
    assert (status["state"], status["attempt"], status["step"]) == ("interrupted", 3, 8)
    assert status["reason"] == "SIGTERM, before the first step"
    write_status(tmp_path, "running")
    lock = lock_run(tmp_path, print)
    state_interrupted(tmp_path, "SIGTERM")
    assert read_status(tmp_path)["state"] == "running", "it is alive"
    lock.release()
    write_status(tmp_path, "finished")
    state_interrupted(tmp_path, "SIGTERM")
    assert read_status(tmp_path)["state"] == "finished"
    state_interrupted(tmp_path / "absent", "SIGTERM")
    assert not (tmp_path / "absent").exists()


def fill_up(directory) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), (directory / "fill").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_on_a_full_disk_the_status_is_written_in_place_and_the_lock_is_taken(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no mounts here")
    try:
        write_status(tmp_path, "running", attempt=7, reason="x" * 300)
        (tmp_path / "lock").write_text("")
        fill_up(tmp_path)
        write_status(tmp_path, "failed", attempt=8)
        assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["attempt"] == 8
        assert sorted(p.name for p in tmp_path.iterdir()) == ["fill", "lock", STATUS_FILE]
        lock = lock_run(tmp_path, print)
        with pytest.raises(RunError, match="a run is alive here"):
            refuse_live_run(tmp_path)
        with pytest.raises(RunError, match="cannot be written: No space left on device"):
            check_shared(tmp_path, 0, lambda value: [value])
        lock.release()
        (tmp_path / STATUS_FILE).unlink()
        fill_up(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            write_status(tmp_path, "failed")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling link"])
def test_a_lock_that_is_no_file_is_refused_at_once_and_left_alone(tmp_path, kind):
    path, target = tmp_path / "run" / "lock", tmp_path / "mine"
    path.parent.mkdir()
    target.write_text("important")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    refuse_live_run(path.parent)
    with pytest.raises(RunError, match="is not a file, so it cannot be the lock of a run: remove it"):
        lock_run(path.parent, print)
    assert target.read_text() == "important" and not (tmp_path / "nowhere").exists()


def test_without_locks_there_is_a_warning(tmp_path):
    code = (
        f"from pathlib import Path; from dsllm.run_directory import lock_run; lock_run(Path({str(tmp_path)!r}), print)"
    )
    output = run_with_flock(UNSUPPORTED, code, tmp_path)
    assert f"{tmp_path}: cannot be locked (" in output and "make sure that no other run uses this directory" in output


def test_the_probe_is_removed_where_a_rank_is_lost(tmp_path):
    def gather(value):
        raise RuntimeError("a rank is lost")

    with pytest.raises(RuntimeError, match="a rank is lost"):
        check_shared(tmp_path, 0, gather)
    assert list(tmp_path.iterdir()) == []


def test_a_removed_lock_is_noticed(tmp_path):
    lock = lock_run(tmp_path, print)
    assert lock.is_in_place()
    lock.path.unlink()
    assert not lock.is_in_place()
    other = lock_run(tmp_path, print)
    assert other.is_in_place() and not lock.is_in_place()
    other.release()
    lock.release()


def test_whether_a_run_is_alive_is_seen_without_touching_anything(tmp_path):
    assert is_locked(tmp_path) is False and not list(tmp_path.iterdir())
    lock = lock_run(tmp_path, print)
    assert is_locked(tmp_path) is True
    lock.release()
    assert is_locked(tmp_path) is False
    code = f"from pathlib import Path; from dsllm.run_directory import is_locked; print(is_locked(Path({str(tmp_path)!r})))"
    assert run_with_flock(UNSUPPORTED, code, tmp_path) == "None\n"
