"""The command table: quick, without torch, and with an exit code for every way to be wrong."""

import subprocess
import sys

import pytest

from dsllm.cli import COMMANDS, main
from dsllm.errors import EXIT_USAGE


def test_help_needs_no_torch():
    code = (
        "import sys; from dsllm.cli import main; main(['--help']); "
        "heavy = {'torch', 'deepspeed', 'transformers', 'pydantic', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("words", [["trian"], []])
def test_no_such_command(words, capsys):
    assert main(words) == EXIT_USAGE
    out = capsys.readouterr()
    assert "prepare, train, launch" in out.err or "usage: dsllm" in out.out


def test_a_user_error_is_one_message_and_no_traceback(capsys, tmp_path):
    assert main(["train", str(tmp_path / "absent.yaml")]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith("dsllm train: error: config file not found") and "Traceback" not in err


def test_dry_run_shows_everything_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", "--dry-run", "--world-size", "2", "train.total_tokens=1e6", "deepspeed=ds_configs/zero2.json"])
        == 0
    )
    out = capsys.readouterr().out
    for part in (
        "total_tokens: 1000000",
        '"stage": 2',
        "parameters   ",
        "2 ranks",
        "steps        ",
        "memory       per rank",
    ):
        assert part in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_a_run_would_refuse(capsys):
    assert main(["train", "--dry-run", "--world-size", "3", "train.precision=fp16"]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert "is not divisible by" in err and "no fp16" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"usage: dsllm {command}" in capsys.readouterr().out
