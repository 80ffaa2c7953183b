"""--json: one JSON document, whole or not there, and alone on standard output where it goes there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsllm.cli import run_command
from dsllm.cli.output import FORMAT_VERSION, json_report, json_text, write_json
from dsllm.errors import EXIT_FAILED, OutputError

NOISY = """
import os, subprocess, sys
from dsllm.cli.output import json_report
early = sys.stdout
with json_report("-", writes=WRITES) as report:
    print("from Python")
    print("by a stream from before", file=early)
    os.write(1, b"below Python\\n")
    subprocess.run(["echo", "by a child"])
    report({"answer": 42})
"""
LINES = ("from Python", "by a stream from before", "below Python", "by a child")


@pytest.mark.parametrize("writes", [True, False])
def test_on_standard_output_the_document_is_alone(writes):
    code = NOISY.replace("WRITES", str(writes))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stderr.splitlines()) == sorted(LINES)
    if writes:
        assert json.loads(done.stdout) == {"format_version": FORMAT_VERSION, "answer": 42}
    else:  # a rank other than 0
        assert done.stdout == ""


def test_output_is_back_on_standard_output_after_the_block(capfd):
    with json_report("-"):
        print("inside")
    print("after", flush=True)
    os.write(1, b"and below\n")
    assert capfd.readouterr() == ("after\nand below\n", "inside\n")


def test_a_reader_that_left_is_an_error_in_words():
    code = "from dsllm.cli.output import json_report\nwith json_report('-') as report: report({'answer': 42})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr.endswith("OutputError: standard output: cannot be written: Broken pipe\n")


def test_a_file_holds_the_document_and_nothing_is_left_aside(tmp_path: Path, capsys):
    with json_report(str(tmp_path / "a.json")) as report:
        print("for people")
        report({"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"format_version": FORMAT_VERSION, "a": 1}
    assert capsys.readouterr().out == "for people\n" and os.listdir(tmp_path) == ["a.json"]


def test_a_block_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), json_report(str(file)) as report:
        report({"a": 1})
        raise ZeroDivisionError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("name", "says"), [("none/a.json", "No such file or directory"), (".", "it is a folder")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str, says: str):
    with pytest.raises(OutputError, match=says), json_report(str(tmp_path / name)):
        pytest.fail("the work has started")


def test_a_disk_that_is_full_after_the_work_is_an_error_in_words(tmp_path: Path):
    with pytest.raises(OutputError, match="/dev/full: cannot be written: No space left"):
        write_json(Path("/dev/full"), {"a": 1})


def test_a_device_is_written_to_and_a_link_is_followed(tmp_path: Path):
    write_json(Path("/dev/null"), {"a": 1})
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_json(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "target").read_text())["a"] == 1


def test_numbers_that_json_does_not_have_are_null():
    text = json_text({"loss": float("nan"), "rows": [{"x": (float("inf"), 1.5)}]})
    assert json.loads(text) == {"format_version": FORMAT_VERSION, "loss": None, "rows": [{"x": [None, 1.5]}]}


def test_a_version_of_the_content_s_own_counts():
    assert json.loads(json_text({"format_version": 7})) == {"format_version": 7}


@pytest.mark.parametrize(
    "words",
    [
        ["prepare"],
        ["evaluate", "run"],
        ["generate", "run"],
        ["export", "run", "--to", "hf"],
        ["launch"],
        ["doctor"],
        ["parity"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_a_bad_file_before_it_works(words, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(words[0], [*words[1:], "--json", "none/a.json"]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert error == f"dsllm {words[0]}: error: none/a.json: cannot be written: No such file or directory\n"
    assert os.listdir(tmp_path) == []
