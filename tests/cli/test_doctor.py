"""dsllm doctor as a user runs it: its output, its JSON, its exit code, and an end in bounded time where ranks are missing."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from dsllm.cli import doctor
from dsllm.processes import free_port
from tests.helpers import jobs
from tests.helpers.launched import BIN, ENVIRONMENT, ROOT
from tests.helpers.tiny_job import RUN

DOCTOR_SECONDS = 60


def examine(folder, world_size, arguments=(), **more):
    """Exit codes, the JSON document (None: it was not written), and the output."""
    job = jobs.start_job(folder, world_size, ["--json", "doctor.json", *arguments], command="doctor", **more)
    codes = job.wait(DOCTOR_SECONDS)
    file = folder / "doctor.json"
    return codes, json.loads(file.read_text()) if file.is_file() else None, job.output()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_end_with_one_conclusion(tmp_path, world_size):
    codes, data, output = examine(tmp_path, world_size)
    assert codes == [0 if data["passed"] else 1] * world_size, output
    assert [rank["place"]["rank"] for rank in data["ranks"]] == list(range(world_size))
    assert output.count(f"dsllm doctor: {world_size} rank") == 1 and "matrix products" in output  # one rank prints
    assert ("all-reduce" in output) == (world_size > 1)
    assert ("nothing is wrong" in output) == data["passed"]
    for finding in data["findings"]:
        assert finding["problem"].split()[0] in output and finding["action"]
    assert {file.name for file in tmp_path.iterdir()} == {"log.txt", "doctor.json"}


def test_the_run_s_folders_and_needs_are_looked_at(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RUN))
    codes, data, output = examine(tmp_path, 1, ["tiny.yaml", "data.directory=data/x"], file_size_limit=4 * 2**20)
    assert [(folder["folder"]["role"], folder["folder"]["path"]) for folder in data["folders"]] == [
        ("run", "runs/tiny"),
        ("data", "data/x"),
    ]
    # no file may grow beyond 4 MiB here, as on a disk that is full: the test file does not fit
    assert codes == [1] and not data["passed"]
    assert any(f["level"] == "error" and "did not fit" in f["problem"] for f in data["findings"]), output
    assert any(f["check"] == "data" and "no such folder" in f["problem"] for f in data["findings"])


@pytest.mark.slow
def test_rank_0_does_not_wait_for_ever_and_names_the_missing_rank(tmp_path):
    start = time.monotonic()
    codes, data, output = examine(tmp_path, 2, ["--timeout-minutes", "0.05"], only_rank=0)
    assert codes == [1] and time.monotonic() - start < DOCTOR_SECONDS / 2
    assert "of 2 ranks 1 did not join within 3 s" in output and "Traceback" not in output
    assert not data["passed"] and data["ranks"][0]["versions"]["versions"]["torch"]  # it reports what it knows


@pytest.mark.slow
def test_a_rank_whose_master_is_not_there_says_so(tmp_path):
    codes, data, output = examine(tmp_path, 2, ["--timeout-minutes", "0.05"], only_rank=1)
    assert codes == [1] and data is None
    assert "nothing listens at port" in output and "Traceback" not in output


def test_a_broken_torch_is_reported_with_all_that_is_known_without_it(tmp_path):
    """A torch that raises when it is imported, found before the real one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so.12: cannot open shared object file')\n"
    )
    words = [sys.executable, "-m", "dsllm", "doctor", "--json", "-"]
    # the folder in front of all others, the way a stray PYTHONPATH breaks an environment
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=DOCTOR_SECONDS)
    data = json.loads(done.stdout)
    assert (
        data["format_version"] == 1
        and done.returncode == 1
        and not data["passed"]
        and data["ranks"][0]["machine"]["open_files"]
    )
    (found,) = [finding for finding in data["findings"] if finding["check"] == "imports"]
    assert "libcudart.so.12" in found["problem"] and "1 error to fix" in done.stderr


def test_wrong_words_are_refused(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--timeout-minutes", "0"])
    assert "must be more than 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_starts_it_as_it_starts_training(launcher, tmp_path):
    script = [str(ROOT / "launch" / "doctor.py")]
    words = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *script],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "dsllm", "doctor"],
    }[launcher]
    command = [str(BIN / words[0]), *words[1:], "--json", "doctor.json"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    data = json.loads((tmp_path / "doctor.json").read_text())
    assert data["launcher"] == launcher and len(data["ranks"]) == 2
    assert (done.returncode == 0) == data["passed"], done.stdout + done.stderr
