"""dsllm doctor --parity as a user runs it."""

import json

import pytest

from dsllm.cli import doctor


def test_a_part_of_the_table_as_json_and_page(tmp_path, capsys):
    page, file = tmp_path / "parity.md", tmp_path / "parity.json"
    words = [
        "--parity",
        "--quick",
        "--only",
        "zero1 fp32 ranks=1 clipping=on",
        "--json",
        str(file),
        "--write",
        str(page),
    ]
    assert doctor.main(words) == 0
    data = json.loads(file.read_text())
    assert data["passed"] and data["rows"] and all(row["combination"]["world_size"] == 1 for row in data["rows"])
    assert f"    dsllm doctor {' '.join(words[:3])} 'zero1 fp32 ranks=1 clipping=on'" in page.read_text()
    assert "agree with plain PyTorch" in capsys.readouterr().out


def test_json_on_the_standard_output_is_alone_there(capsys):
    assert doctor.main(["--parity", "--quick", "--only", "zero1 fp32 ranks=1 clipping=on", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_what_cannot_be_run_is_said(capsys):
    assert doctor.main(["--parity", "--only", "no such words"]) == 2
    assert "--only matches none" in capsys.readouterr().err
    for wrong in (["--quick"], ["--parity", "--world-sizes", "3"], ["--parity", "--world-sizes", "two"]):
        with pytest.raises(SystemExit):
            doctor.main(wrong)
    assert "--quick belongs to --parity" in capsys.readouterr().err
