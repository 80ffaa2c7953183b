"""The command table: help without heavy imports, and an exit code for every mistake."""

import subprocess
import sys

import pytest

from dsllm.cli import COMMANDS, main
from dsllm.errors import EXIT_USAGE

HEAVY = ("torch", "deepspeed", "numpy", "transformers", "pydantic", "rich", "matplotlib")
HELP = f"""
import sys
from dsllm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""


def help_of(*command: str) -> str:
    """What `dsllm COMMAND --help` prints, in a process that must load none of the heavy libraries."""
    done = subprocess.run([sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_loads_no_heavy_library():
    shown = help_of()
    assert all(f"  {name}" in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_heavy_library_and_explains_json(command):
    shown = help_of(command)
    assert f"usage: dsllm {command}" in shown and "--json FILE" in shown


def test_the_check_of_help_finds_a_library_that_is_loaded():
    code = f"import pydantic\n{HELP}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode and "['pydantic']" in done.stderr


@pytest.mark.parametrize("words", [["trian"], []])
def test_no_such_command(words, capsys):
    assert main(words) == EXIT_USAGE
    out = capsys.readouterr()
    assert "prepare, train, launch" in out.err or "usage: dsllm" in out.out


def test_a_mistyped_command_gets_a_guess(capsys):
    main(["trian"])
    assert "Did you mean 'train'?" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("prepare", "train", "parity")])
def test_ctrl_c_ends_a_command_in_a_word(command, monkeypatch, capsys):
    """prepare, train and parity say more: whether anything is saved, and that no rank is left."""

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dsllm.cli.{command}.main", interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
