"""`dsllm prepare` prints what a user wants to know, and its exit code says how it went."""

import json
from pathlib import Path

import pytest

from dsllm.cli import run_command
from dsllm.cli.prepare import main
from dsllm.data.manifest import load_manifest
from tests.helpers.preparing import GOLDEN


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """A recipe of the golden text, and where to prepare it."""
    path = tmp_path / "tiny.yaml"
    source = {"name": "golden", "paths": [str(GOLDEN)], "text_documents": "paragraphs"}
    data = {"sources": [source], "validation_share": 0.1, "num_workers": 1, "sequence_length": 32}
    path.write_text(json.dumps({"data": data, "tokenizer": {"vocab_size": 300}}))
    return [str(path), f"data.directory={tmp_path}/data"]


def test_it_prints_the_card(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(recipe) == 0
    output = capsys.readouterr().out
    read = "912 read = 912 kept + 0 duplicates + 0 empty + 0 bad"
    for part in ("golden", "held out", read, "xz -9", "bytes per token"):
        assert part in output
    assert f"Prepared in {tmp_path}/data" in output
    assert "\x1b" not in output  # not a terminal: no colours, no moving bars
    assert load_manifest(tmp_path / "data").tokenizer.vocab_size == 300


def test_the_card_as_json_is_alone_on_standard_output(recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main([*recipe, "--json", "-"]) == 0
    output = capfd.readouterr()
    card = json.loads((tmp_path / "data" / "data_card.json").read_text())
    assert json.loads(output.out) == {**card, "directory": f"{tmp_path}/data"}
    assert f"Prepared in {tmp_path}/data" in output.err


def test_again_does_nothing_and_other_settings_need_force(recipe: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command("prepare", recipe) == 0
    assert run_command("prepare", recipe) == 0
    assert "prepared already with these settings" in capsys.readouterr().out
    assert run_command("prepare", [*recipe, "tokenizer.vocab_size=290"]) == 1
    assert "tokenizer.vocab_size: was 300, now 290" in capsys.readouterr().err
    assert run_command("prepare", [*recipe, "--force", "tokenizer.vocab_size=290"]) == 0


def test_overrides_may_stand_alone_and_options_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a config the embedded recipe is prepared, here with files of our own."""
    monkeypatch.chdir(tmp_path)
    source = f"[{{name: g, paths: [{GOLDEN}], text_documents: lines}}]"
    assert (
        main(
            ["tokenizer.vocab_size=290", "--force", f"data.sources={source}", "data.directory=x", "data.num_workers=1"]
        )
        == 0
    )
    assert load_manifest(tmp_path / "x").sources[0].name == "g"


def test_skipped_inputs_are_listed(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbad\n')
    (tmp_path / "web" / "notes.rst").write_text("x")
    (tmp_path / "web" / "part-1.jsonl").touch()
    source = f"data.sources=[{{name: web, paths: [{tmp_path}/web], on_bad_input: skip}}]"
    assert main([*recipe, source]) == 0
    output = capsys.readouterr().out
    assert "web: 3 read = 2 kept + 0 duplicates + 0 empty + 1 bad" in output
    assert f"web: skipped 1: not valid JSON; for example {tmp_path}/web/a.jsonl, line 3" in output
    assert "web: files not read: 1 .rst" in output
    assert f"web: 1: empty file, passed over; for example {tmp_path}/web/part-1.jsonl" in output


def test_problems_are_reported_without_a_traceback(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_command("prepare", [*recipe, f"data.sources=[{{name: a, paths: [{tmp_path}/none]}}]"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsllm prepare: error: source 'a'") and "no such file or folder" in error
    assert run_command("prepare", ["none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err
