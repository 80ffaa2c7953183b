"""A rank notices that its launcher has gone, through every process between them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsllm.engine.processes.launcher import Launcher

RANK = """
import sys, time
from dsllm.engine.processes.launcher import Launcher
launcher = Launcher()
print(len(launcher.processes), launcher.has_gone(), flush=True)
deadline = time.monotonic() + 20
while not launcher.has_gone() and time.monotonic() < deadline:
    time.sleep(0.01)
open(sys.argv[1], "w").write("gone" if launcher.has_gone() else "there")
"""

MIDDLE = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


@pytest.mark.parametrize(
    ("program", "killed"), [("deepspeed", "runner"), ("deepspeed", "middle"), ("mpiexec.hydra", "runner")]
)
def test_the_end_of_any_launcher_above_is_seen(tmp_path, program, killed):
    """As under deepspeed: a runner starts a launcher, the launcher starts the rank."""
    runner, noticed = tmp_path / program, tmp_path / "noticed"
    middle = [sys.executable, "-c", MIDDLE, RANK, str(noticed), "deepspeed.launcher.launch"]
    runner.write_text(f"import subprocess\nsubprocess.run({middle!r})\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, str(runner)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "2 False\n"
        if killed == "runner":
            process.kill()
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), 9)
        deadline = time.monotonic() + 20
        while not noticed.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert noticed.read_text() == "gone"


def test_a_shell_is_no_launcher():
    """A job that nohup has detached from its terminal trains on."""
    code = "from dsllm.engine.processes.launcher import Launcher; print(len(Launcher().processes))"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c '{code}'"], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_this_process_has_none():
    assert not Launcher().has_gone()
