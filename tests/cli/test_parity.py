"""dsllm parity, and dsllm doctor --parity, as a user runs them."""

import json
from pathlib import Path

import pytest

from dsllm.cli import run_command

ONE_ROW = ["--quick", "--only", "zero1 fp32 ranks=1 clipping=on"]


def test_a_part_of_the_table_as_json_and_page(tmp_path: Path, capsys):
    page, file = tmp_path / "parity.md", tmp_path / "parity.json"
    words = [*ONE_ROW, "--seed", "5", "--json", str(file), "--write", str(page)]
    assert run_command("parity", words) == 0
    data = json.loads(file.read_text())
    assert data["passed"] and data["rows"] and all(row["combination"]["world_size"] == 1 for row in data["rows"])
    assert (data["format_version"], data["seed"]) == (1, 5)
    assert f"    dsllm parity --quick --only '{ONE_ROW[-1]}' --seed 5 --json {file}" in page.read_text()
    assert "agree with plain PyTorch" in capsys.readouterr().out


def test_doctor_parity_is_the_same_command_and_its_json_is_alone_on_standard_output(capfd):
    assert run_command("doctor", [ONE_ROW[0], "--parity", *ONE_ROW[1:], "--json", "-"]) == 0
    output = capfd.readouterr()
    data = json.loads(output.out)
    assert data["passed"] and data["command"] == f"dsllm parity --quick --only '{ONE_ROW[-1]}' --json -"
    assert "agree with plain PyTorch" in output.err


def test_a_page_that_cannot_be_written_is_refused_before_the_table_is_run(capsys):
    assert run_command("parity", [*ONE_ROW, "--write", "none/parity.md"]) == 1
    output = capsys.readouterr()
    assert "none/parity.md: cannot be written: No such file or directory" in output.err and output.out == ""


def test_what_cannot_be_run_is_refused(capsys):
    assert run_command("parity", ["--only", "no such words"]) == 2
    assert "--only matches none" in capsys.readouterr().err
    for command, wrong, says in [
        ("parity", ["--world-sizes", "3"], "3 ranks are not in the table"),
        ("parity", ["--world-sizes", "two"], "'two' is not a list of numbers"),
        ("doctor", ["--parity", "run.yaml"], "unrecognized arguments: run.yaml"),
        ("doctor", ["--quick"], "unrecognized arguments: --quick"),
    ]:
        with pytest.raises(SystemExit) as ended:
            run_command(command, wrong)
        assert ended.value.code == 2 and says in capsys.readouterr().err
