"""dsllm launch from the command line: a dry run leaves no trace, mistakes cost no start, real jobs end with a true code."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from dsllm.cli import run_command
from dsllm.launch.job import JOB_VARIABLE
from tests.cli.test_launchers import prepared  # noqa: F401 - a fixture
from tests.helpers.launched import ENVIRONMENT, fingerprint, losses
from tests.helpers.tiny_job import NUM_STEPS

DSLLM = [sys.executable, "-m", "dsllm"]
ROOT = Path(__file__).parents[2]
SSH = """#!/bin/bash
# As sshd: the words after the host's name in one line, in a new shell without the caller's variables.
while [ "${1#-}" != "$1" ]; do case "$1" in -o) shift 2 ;; *) shift ;; esac; done; shift
cd /; exec env -i PATH="$PATH" HOME="$HOME" sh -c "$*"
"""


def write_run(folder: Path) -> None:
    (folder / "my run.yaml").write_text(
        "run: {name: tiny}\ntrain: {global_batch_sequences: 48, micro_batch_sequences: 1}\n"  # for 1, 2, 3 and 16 ranks
    )
    (folder / "hosts").write_text("n1 slots=2\nn2 slots=1\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--with", "torchrun"],
        ["--with", "mpi"],
        ["--hostfile", "hosts"],
        ["--hostfile", "hosts", "--with", "mpi"],
        ["--cluster", str(ROOT / "launch" / "cluster" / "slurm.yaml")],
    ],
    ids=lambda words: " ".join(words[:2] + words[3:]) or "local",
)
def test_a_dry_run_shows_everything_and_leaves_no_trace(tmp_path, monkeypatch, capsys, words):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_command("launch", ["my run.yaml", "data.directory=a b;touch F", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# file " in shown and "# command for " in shown
    assert f"dsllm train '{tmp_path}/my run.yaml' 'data.directory=a b;touch F'" in shown or "set -- '" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_as_json_is_alone_on_standard_output(tmp_path, monkeypatch, capfd):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_command("launch", ["my run.yaml", "--hostfile", "hosts", "--dry-run", "--json", "-"]) == 0
    output = capfd.readouterr()
    plan = json.loads(output.out)
    assert list(plan["commands"]) == ["n1", "n2"] and all(command[0] == "ssh" for command in plan["commands"].values())
    assert plan["files"] and all(f"# file {path}\n{text}" in output.err for path, text in plan["files"].items())
    assert plan["format_version"] == 1 and plan["job"].startswith("tiny-")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hostfile", "nowhere"], "no such file; without it the job would run on this machine alone"),
        (["train.totl_tokens=1"], "did you mean 'total_tokens'?"),
        (["no such.yaml"], "config file not found"),
        (["--cluster", "bad.yaml"], "bad.yaml:2: slots: "),
    ],
)
def test_mistakes_are_reported_before_anything_starts(tmp_path, monkeypatch, capsys, words, says):
    write_run(tmp_path)
    (tmp_path / "bad.yaml").write_text("port: 1\nslots: 0\n")
    monkeypatch.chdir(tmp_path)
    run = [] if words[0].endswith(".yaml") else ["my run.yaml"]
    assert run_command("launch", [*run, *words]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_launching_needs_no_torch(tmp_path):
    script = (
        "import sys; from dsllm.cli import run_command; code = run_command('launch', ['--dry-run']); "
        "assert code == 0; assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(prepared, tmp_path) -> Path:  # noqa: F811
    """A prepared run in a folder whose name has a blank and a quote, and an `ssh` that stays on this machine."""
    job = tmp_path / "it's a job"
    shutil.copytree(prepared, job)
    (job / "bin").mkdir()
    (job / "bin" / "ssh").write_text(SSH)
    (job / "bin" / "ssh").chmod(0o755)
    cluster = {"hosts": [{"name": "n1", "slots": 1}, {"name": "n2", "slots": 1}], "master_address": "127.0.0.1"}
    (job / "cluster.yaml").write_text(yaml.safe_dump({**cluster, "environment": {"OMP_NUM_THREADS": 1}}))
    (job / "local.yaml").write_text("slots: 2\n")
    return job


def start(folder: Path, *words: str) -> subprocess.Popen:
    environment = {**ENVIRONMENT, "PATH": f"{folder / 'bin'}:{ENVIRONMENT['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*DSLLM, "launch", "tiny.yaml", "model.dropout=0", *words],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(folder: Path, job: subprocess.Popen, seconds: float = 240) -> int:
    try:
        return job.wait(seconds)
    finally:
        job.kill()
        left = [p for p in psutil.process_iter() if _belongs(p, folder)]
        for process in left:
            process.kill()
        assert not left, f"left behind: {left}\n{(folder / 'log').read_text()}"


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return JOB_VARIABLE in process.environ() and process.cwd() == str(folder)
    except psutil.Error:
        return False


def wait_for_steps(folder: Path, job: subprocess.Popen) -> None:
    file, deadline = folder / "runs" / "tiny" / "metrics.jsonl", time.monotonic() + 180
    while not file.is_file() or len(file.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and job.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)


def state(folder: Path) -> str:
    return json.loads((folder / "runs" / "tiny" / "status.json").read_text())["state"]


LAUNCHES = {
    "local": ["--cluster", "local.yaml"],
    "local torchrun": ["--cluster", "local.yaml", "--with", "torchrun"],
    "hosts": ["--cluster", "cluster.yaml"],
    "hosts torchrun": ["--cluster", "cluster.yaml", "--with", "torchrun"],
    "mpi": ["--cluster", "mpi.yaml"],
}
ENDLESS = [f"train.total_tokens={5000 * 8 * 32}", "train.schedule.shape=constant"]


def prepare_launch(folder: Path, name: str) -> list[str]:
    if name == "mpi":
        if shutil.which("mpirun") is None:
            pytest.skip("mpirun is not installed")
        (folder / "mpi.yaml").write_text(
            "launcher: mpi\nhosts: [{name: localhost, slots: 2}]\nmaster_address: 127.0.0.1\n"
        )
    return LAUNCHES[name]


@pytest.fixture(scope="module")
def reference(prepared, tmp_path_factory) -> Path:  # noqa: F811
    """The same run on two ranks, started without us."""
    folder = tmp_path_factory.mktemp("reference") / "job"
    shutil.copytree(prepared, folder)
    words = ["deepspeed", "--num_gpus", "2", "--master_port", "29877", str(ROOT / "launch" / "pretrain.py")]
    subprocess.run([*words, "--config", "tiny.yaml", "model.dropout=0"], cwd=folder, env=ENVIRONMENT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_launcher_trains_the_same_run(reference, folder, name):
    assert end(folder, start(folder, *prepare_launch(folder, name))) == 0, (folder / "log").read_text()
    assert state(folder) == "finished" and len(losses(folder)) == NUM_STEPS
    assert losses(folder) == losses(reference) and fingerprint(folder) == fingerprint(reference)


@pytest.mark.slow
def test_the_end_of_a_job_as_json_is_alone_on_standard_output(folder):
    words = ["train.total_tokens=512", *LAUNCHES["local"]]
    done = subprocess.run(
        [*DSLLM, "launch", "tiny.yaml", *words, "--json", "-"],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    ended = json.loads(done.stdout)
    assert (done.returncode, ended["exit_code"], ended["reason"]) == (0, 0, "finished"), done.stderr
    assert all(Path(file).is_file() for file in ended["files"]) and "trained 512 tokens" in done.stderr
    (output,) = [Path(file) for file in ended["files"] if file.endswith("output.log")]
    assert "trained 512 tokens" in output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_ctrl_c_saves_on_all_ranks_and_says_75(folder, name):
    job = start(folder, *prepare_launch(folder, name), *ENDLESS)
    wait_for_steps(folder, job)
    job.send_signal(signal.SIGINT)
    assert end(folder, job) == 75, (folder / "log").read_text()
    assert state(folder) == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_killed_rank_ends_the_job_with_1(folder, name):
    job = start(folder, *prepare_launch(folder, name), *ENDLESS)
    wait_for_steps(folder, job)
    ranks = [
        p for p in psutil.process_iter() if _belongs(p, folder) and {"RANK", "OMPI_COMM_WORLD_RANK"} & {*p.environ()}
    ]
    max(ranks, key=lambda p: int(p.environ().get("RANK", p.environ().get("OMPI_COMM_WORLD_RANK", "0")))).kill()
    began = time.monotonic()
    assert end(folder, job) == 1, (folder / "log").read_text()
    assert time.monotonic() - began < 60 and state(folder) == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "hosts"])
def test_killed_itself_it_leaves_nothing_behind(folder, name):
    job = start(folder, *prepare_launch(folder, name), *ENDLESS)
    wait_for_steps(folder, job)
    job.kill()
    job.wait()
    deadline = time.monotonic() + 60
    while [p for p in psutil.process_iter() if _belongs(p, folder)]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert state(folder) == "interrupted"  # the ranks received the signal and saved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "hosts"])
def test_a_killed_watch_does_not_hide_that_the_ranks_have_saved(folder, name):
    """Nobody is left to pass signals on: the ranks notice, save and exit, and only then is the job judged."""
    job = start(folder, *prepare_launch(folder, name), *ENDLESS)
    wait_for_steps(folder, job)
    watches = [p for p in psutil.process_iter() if _belongs(p, folder) and "dsllm.launch.node" in p.cmdline()]
    assert len(watches) == (1 if name == "local" else 2)
    for watch in watches:
        watch.kill()
    assert end(folder, job) == 75, (folder / "log").read_text()
    assert state(folder) == "interrupted" and "while they save" in (folder / "log").read_text()


@pytest.mark.slow
def test_a_killed_launcher_of_deepspeeds_is_no_success(folder):
    """`deepspeed` itself exits 0 here, and its ranks keep running."""
    job = start(folder, *LAUNCHES["local"], *ENDLESS)
    wait_for_steps(folder, job)
    (launcher,) = [
        p for p in psutil.process_iter() if _belongs(p, folder) and "deepspeed.launcher.launch" in p.cmdline()
    ]
    launcher.kill()
    assert end(folder, job) == 75, (folder / "log").read_text()
