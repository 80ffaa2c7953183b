"""A SLURM job is followed to its end, whichever way it ends. SLURM's commands are small scripts here, for speed."""

import shlex
import signal
from pathlib import Path

import pytest

from dsllm.errors import LaunchError
from dsllm.launch import batch
from dsllm.launch.batch import follow_batch, look, submit
from dsllm.launch.follow import StopRequest, Waits

ENDS = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"),
)
"""The states of a job that has ended, of `man squeue`."""

SCONTROL = """#!/bin/bash
# Prints the next answer; the last one again and again.
cd "$(dirname "$0")"
head -n 1 answers
[ "$(wc -l < answers)" = 1 ] || sed -i 1d answers
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder on the PATH with an `scontrol` that prints the lines of `answers`."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(batch, "_POLL_SECONDS", 0.05)
    return tmp_path


def follow(folder: Path, *states: str) -> tuple[batch.JobState, str]:
    """The job's last state, and what was written."""
    (folder / "answers").write_text("".join(f"JobId=7 JobState={state} Reason=None ExitCode=0:0\n" for state in states))
    written: list[bytes] = []
    state = follow_batch("7", folder / "slurm-7.log", Waits(save=5, end=5), StopRequest(), written.append)
    return state, b"".join(written).decode()


@pytest.mark.slow
@pytest.mark.timeout(20)  # a state that is not known as an end would be waited on forever
@pytest.mark.parametrize("state", ENDS)
def test_every_end_is_known_as_one(slurm, state):
    (slurm / "slurm-7.log").write_text("step 1\n")
    found, written = follow(slurm, "PENDING", "RUNNING", state)
    assert found.state == state and written.splitlines()[-1] == f"job 7: {state}"
    assert "step 1" in written


@pytest.mark.timeout(20)
def test_a_requeued_job_is_followed_on(slurm):
    found, written = follow(slurm, "RUNNING", "COMPLETING", "PENDING", "RUNNING", "COMPLETED")
    assert found.state == "COMPLETED" and written.count("job 7: RUNNING") == 2


@pytest.mark.parametrize(("text", "code"), [("0:0", 0), ("75:0", 75), ("0:9", 137)])
def test_the_exit_code_is_that_of_the_batch_script(slurm, text, code):
    (slurm / "answers").write_text(f"JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode={text}\n")
    assert look("7").exit_code == code and look("7").reason == "NonZeroExitCode"


def test_without_slurm_its_missing_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch: no such program here"):
        submit(("sbatch", "job.sbatch"))


@pytest.mark.timeout(20)
def test_a_controller_that_never_answers_again_does_not_hold_a_stop(slurm):
    """Whoever asks for a stop gets the terminal back, after the time that the ranks have for saving, and a little more."""
    (slurm / "scontrol").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    (slurm / "scancel").write_text("#!/bin/bash\nexit 1\n")
    (slurm / "scancel").chmod(0o755)
    stop, written = StopRequest(by=signal.SIGINT), []
    state = follow_batch("7", slurm / "slurm-7.log", Waits(save=0.3, end=0.3), stop, written.append)
    assert (state.state, state.exit_code) == ("UNKNOWN", 1) and "does not answer" in state.reason


@pytest.mark.timeout(20)
def test_output_that_cannot_be_read_does_not_end_the_job(slurm):
    """A folder in its place, for what a network file system does for a moment."""
    (slurm / "slurm-7.log").mkdir()
    assert follow(slurm, "RUNNING", "COMPLETED")[0].state == "COMPLETED"


@pytest.mark.parametrize(
    ("printed", "number"),
    [("7", "7"), ("7;cluster", "7"), ("checking your quota of 100 h ...\nok\n7", "7"), ("ok", None)],
)
def test_the_number_of_the_job_is_found_in_what_sbatch_prints(slurm, printed, number):
    (slurm / "sbatch").write_text(f"#!/bin/bash\nprintf '%s\\n' {shlex.quote(printed)}\n")
    (slurm / "sbatch").chmod(0o755)
    if number:
        assert submit(("sbatch",)) == number
    else:
        with pytest.raises(LaunchError, match="printed no job number: 'ok'"):
            submit(("sbatch",))
