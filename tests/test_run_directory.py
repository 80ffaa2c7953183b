"""The run directory: one live run, a true status, metrics that survive a kill."""

import json
import subprocess
import sys

import pytest

from dsllm.errors import RunError
from dsllm.run_directory import check_shared, is_locked, lock_run, read_status, write_status
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


def test_whether_a_run_is_alive_is_seen_without_touching_anything(tmp_path):
    assert is_locked(tmp_path) is False and not list(tmp_path.iterdir())
    lock = lock_run(tmp_path, print)
    assert is_locked(tmp_path) is True
    lock.release()
    assert is_locked(tmp_path) is False
    code = f"from pathlib import Path; from dsllm.run_directory import is_locked; print(is_locked(Path({str(tmp_path)!r})))"
    assert run_with_flock(UNSUPPORTED, code, tmp_path) == "None\n"
