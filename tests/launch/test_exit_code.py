"""One exit code, true whatever launchers make of their ranks' codes."""

import signal

import pytest

from dsllm.launch.exit_code import is_over, outcome_of

OLD = {"attempt": 3, "state": "interrupted"}


@pytest.mark.parametrize(
    ("after", "codes", "stopped_by", "code", "says"),
    [
        ({"attempt": 4, "state": "finished"}, [0, 0], None, 0, "finished"),
        ({"attempt": 4, "state": "finished"}, [250, 0], None, 0, "not every rank left well"),
        ({"attempt": 4, "state": "interrupted", "step": 7}, [1, 1], signal.SIGTERM, 75, "saved at step 7"),
        ({"attempt": 4, "state": "failed", "reason": "RunError: x"}, [247, 0], None, 1, "RunError: x"),
        ({"attempt": 4, "state": "running"}, [0], None, 1, "without a word"),  # launch.py was killed: deepspeed exits 0
        ({"attempt": 4, "state": "running"}, [137], signal.SIGINT, 1, "before it could save"),
        (OLD, [0], None, 1, "did not begin"),
        (OLD, [2, 2], None, 2, "did not begin"),
        (OLD, [0, 127], None, 127, "is shared_directory shared"),
        (OLD, [255, 143], None, 255, "ssh HOST true"),
        (OLD, [143], signal.SIGTERM, 143, "before the run had begun"),
    ],
)
def test_the_runs_own_word_counts(after, codes, stopped_by, code, says):
    outcome = outcome_of(OLD, after, codes, stopped_by)
    assert outcome.code == code and says in outcome.reason


def test_a_first_start_has_no_status_before(tmp_path):
    assert outcome_of({}, {"attempt": 1, "state": "finished"}, [0], None).code == 0
    assert outcome_of({}, {}, [0], None).code == 1


def test_an_earlier_attempts_end_is_not_this_ones():
    assert not is_over(OLD, OLD) and not is_over({}, {}) and is_over(OLD, {"attempt": 4, "state": "failed"})
