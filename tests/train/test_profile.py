"""Which steps are profiled, and what is refused."""

import pytest

from dsllm.errors import RunError
from dsllm.train.profile import ProfiledSteps, steps_to_profile


def test_three_steps_after_a_warm_up_unless_others_are_asked_for():
    assert steps_to_profile("", 0, 100) == ProfiledSteps(5, 7)
    assert steps_to_profile("", 40, 100) == ProfiledSteps(45, 47)  # of a resumed run
    assert steps_to_profile("2:2", 0, 100) == ProfiledSteps(2, 2)
    assert steps_to_profile("42:100", 40, 100) == ProfiledSteps(42, 100)


@pytest.mark.parametrize(
    ("asked", "done", "num_steps"),
    [("", 0, 6), ("", 95, 100), ("1:3", 0, 100), ("41:43", 40, 100), ("99:101", 0, 100), ("7:5", 0, 100)],
)
def test_steps_that_do_not_come_are_refused_with_those_that_do(asked, done, num_steps):
    with pytest.raises(
        RunError, match=rf"takes the steps {done + 1} to {num_steps}; FIRST must be at least {done + 2}"
    ):
        steps_to_profile(asked, done, num_steps)


@pytest.mark.parametrize("asked", ["5", ":5", "5:", "3:4:5"])
def test_what_is_not_first_and_last_is_refused(asked):
    with pytest.raises(RunError, match="write it as FIRST:LAST"):
        steps_to_profile(asked, 0, 100)
