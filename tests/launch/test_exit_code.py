"""One exit code, true whatever launchers make of their ranks' codes; a status that cannot be read for a moment is no end."""

import errno
import json
import os
import signal
import threading
import time

import pytest

from dsllm.errors import RunError
from dsllm.launch.exit_code import has_ended, outcome_of, read_patiently
from dsllm.run_directory import read_status, write_status

OLD = {"attempt": 3, "state": "interrupted"}


@pytest.mark.parametrize(
    ("after", "codes", "stopped_by", "code", "says"),
    [
        ({"attempt": 4, "state": "finished"}, [0, 0], None, 0, "finished"),
        ({"attempt": 4, "state": "finished"}, [250, 0], None, 0, "not every rank ended cleanly"),
        ({"attempt": 4, "state": "interrupted", "step": 7}, [1, 1], signal.SIGTERM, 75, "saved at step 7"),
        ({"attempt": 4, "state": "failed", "reason": "RunError: x"}, [247, 0], None, 1, "RunError: x"),
        # launch.py was killed: deepspeed exits 0
        ({"attempt": 4, "state": "running"}, [0], None, 1, "without writing its status"),
        ({"attempt": 4, "state": "running"}, [137], signal.SIGINT, 1, "before it could save"),
        (OLD, [0], None, 1, "did not begin"),
        (OLD, [2, 2], None, 2, "did not begin"),
        (OLD, [0, 127], None, 127, "is shared_directory shared"),
        (OLD, [255, 143], None, 255, "ssh HOST true"),
        (OLD, [143], signal.SIGTERM, 143, "before the run had begun"),
    ],
)
def test_the_runs_status_takes_precedence(after, codes, stopped_by, code, says):
    outcome = outcome_of(OLD, after, codes, stopped_by)
    assert outcome.code == code and says in outcome.reason


def test_a_run_that_was_finished_before_is_no_failure():
    """Its ranks find nothing to train and count no attempt."""
    done = {"attempt": 3, "state": "finished"}
    outcome = outcome_of(done, done, [0, 0], None)
    assert outcome.code == 0 and "finished before" in outcome.reason
    assert outcome_of(done, done, [0, 1], None).code == 1  # refused, by one rank at least


def test_a_first_start_has_no_status_before(tmp_path):
    assert outcome_of({}, {"attempt": 1, "state": "finished"}, [0], None).code == 0
    assert outcome_of({}, {}, [0], None).code == 1


def test_an_earlier_attempts_end_is_not_this_ones():
    assert not has_ended(OLD, lambda: OLD) and not has_ended({}, dict)
    assert has_ended(OLD, lambda: {"attempt": 4, "state": "failed"})


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_status_that_cannot_be_read_for_a_moment_is_no_end(number):
    answers = [OSError(number, os.strerror(number)), {"attempt": 4, "state": "finished"}]

    def read() -> dict:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert not has_ended(OLD, read) and has_ended(OLD, read)


def test_the_last_status_is_waited_for(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "fini')  # a part of it, as after a power cut
    assert not has_ended({}, lambda: read_status(tmp_path))
    threading.Timer(0.3, write_status, (tmp_path, "finished"), {"attempt": 1}).start()
    assert read_patiently(lambda: read_status(tmp_path), 20)["state"] == "finished"
    assert has_ended({}, lambda: read_status(tmp_path))


@pytest.mark.slow
def test_patience_has_an_end(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"format_version": -1}))
    began = time.monotonic()
    with pytest.raises(RunError, match="is not the status of a run"):
        read_patiently(lambda: read_status(tmp_path), 0.6)
    assert 0.5 < time.monotonic() - began < 10
