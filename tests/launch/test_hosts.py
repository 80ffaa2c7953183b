"""Arguments, variables and paths reach every host unchanged: nothing is executed, expanded, split or lost."""

import argparse
import base64
import json
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher import multinode_runner, runner
from torch.distributed import run as torchrun

from dsllm.launch.hosts import local_launch, ssh_launch
from dsllm.launch.job import Launch
from tests.launch.jobs import HOSTILE, HOSTS, make_job, record, recording_cluster


def write(launch: Launch) -> None:
    for path, text in launch.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def as_sshd(words: tuple[str, ...], shell: str, folder: Path) -> subprocess.CompletedProcess:
    """Do as sshd does: join the words after the host's name into one line, and let the user's shell read it."""
    host = next(i for i, word in enumerate(words) if word in ("n1", "n2"))
    return subprocess.run(
        [shell, "-c", " ".join(words[host + 1 :])], cwd=folder, capture_output=True, text=True, check=True
    )


def launched(argv: list[str]) -> list[str]:
    """The launcher's words: what follows `--` and the Python."""
    assert argv[:3] == ["-u", "-m", "dsllm.launch.node"]
    return argv[argv.index("--") + 2 :]


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_words_pass_sshs_shell_and_deepspeeds_launcher_untouched(tmp_path, shell):
    job = make_job(tmp_path)
    launch = ssh_launch(job, recording_cluster(tmp_path, hosts=HOSTS, interface="eth7"), with_torchrun=False)
    write(launch)
    as_sshd(launch.commands["n2"], shell, tmp_path)
    seen = record(job)
    assert "--node=1" in seen["argv"]
    words = launched(seen["argv"])
    assert words[:2] == ["-m", "deepspeed.launcher.runner"]
    parsed = runner.parse_args(words[2:])
    assert parsed.user_script == "dsllm" and tuple(parsed.user_args) == ("train", *HOSTILE)
    assert parsed.no_ssh and parsed.node_rank == 1 and parsed.master_addr == "n1"
    assert runner.fetch_hostfile(parsed.hostfile) == {"n1": 1, "n2": 1}


def test_words_pass_torchrun_untouched(tmp_path):
    job = make_job(tmp_path)
    launch = ssh_launch(job, recording_cluster(tmp_path, hosts=HOSTS), with_torchrun=True)
    write(launch)
    as_sshd(launch.commands["n1"], "bash", tmp_path)
    parsed = torchrun.get_args_parser().parse_args(launched(record(job)["argv"])[2:])
    assert (parsed.training_script, *parsed.training_script_args) == ("dsllm", "train", *HOSTILE)
    assert (parsed.nnodes, parsed.node_rank, parsed.master_addr) == ("2", 0, "n1")


@pytest.mark.parametrize("with_torchrun", [False, True])
def test_a_local_run_gets_its_words_untouched_too(tmp_path, with_torchrun):
    job = make_job(tmp_path)
    launch = local_launch(job, recording_cluster(tmp_path, slots=3), with_torchrun)
    write(launch)
    subprocess.run(launch.commands["localhost"], check=True)
    words = launched(record(job)["argv"])
    assert tuple(words[-len(HOSTILE) :]) == HOSTILE and "3" in words


def test_what_we_keep_deepspeeds_pdsh_launcher_from(tmp_path):
    """DeepSpeed's own command for pdsh, built by it and read by a shell as on a host: words run there. If this test fails
    one day, DeepSpeed has fixed it, and docs/launch.md should say so."""
    world = base64.urlsafe_b64encode(json.dumps({"n1": [0], "n2": [0]}).encode()).decode()
    options = argparse.Namespace(
        **vars(
            runner.parse_args(["--master_addr", "n1", "--master_port", "1", "script.py", "x=b;>F", "s=$(touch G) x"])
        )
    )
    words, stop, _ = multinode_runner.PDSHRunner(options, world).get_cmd({}, {"n1": [0], "n2": [0]})
    launch = words.index("-u") - 1
    text = " ".join(["true", *words[launch + 1 :]])  # `true` in place of the Python that would start
    subprocess.run(["bash", "-c", text], cwd=tmp_path, check=False, capture_output=True)
    assert (tmp_path / "F").exists() and (tmp_path / "G").exists()
    assert "pkill -f " in stop and "master_port" not in stop[-1]  # ends the launch.py of every job on the hosts
