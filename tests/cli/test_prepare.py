"""`dsllm prepare` prints what a user wants to know, and its exit code says how it went."""

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
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
    assert f"web: empty file, passed over: 1, for example {tmp_path}/web/part-1.jsonl" in output


def test_problems_are_reported_without_a_traceback(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_command("prepare", [*recipe, f"data.sources=[{{name: a, paths: [{tmp_path}/none]}}]"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsllm prepare: error: source 'a'") and "no such file or folder" in error
    assert run_command("prepare", ["none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_what_the_data_card_may_contain(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Tries 150 damages of the card and of the manifest: the card is shown, or an error in words, and nothing is changed."""
    assert run_command("prepare", recipe) == 0
    rng, folder = random.Random(11), tmp_path / "data"
    whole = {name: (folder / name).read_bytes() for name in ("data_card.json", "manifest.json")}
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name not in whole}
    for i in range(150):
        name = list(whole)[i % 2]
        (folder / name).write_bytes(damaged(whole[name], rng))
        content = (folder / name).read_bytes()
        capsys.readouterr()
        code = run_command("prepare", recipe)
        output = capsys.readouterr()
        assert code in (0, 1) and (code == 0) == ("Prepared in" in output.out), content
        assert code == 0 or output.err.startswith("dsllm prepare: error: "), content
        assert (folder / name).read_bytes() == content
        (folder / name).write_bytes(whole[name])
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name not in whole}


def damaged(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        case 2:
            return rng.choice(
                [b"", b"null", b"[1]", b"{}", b"[" * 100_000, b'{"sources": 1}', b'{"format_version": 1}']
            )
        case 3:
            key = rng.choice(re.findall(rb'"[a-z_0-9]+":', content))
            return content.replace(key, b'"other":', 1)
        case _:
            value = rng.choice([b"null", b"[]", b"{}", b'"x"', b"-1", b"1e400", b"9" * 5000])
            return re.sub(rb"(?<=: )[0-9]+", lambda match: value if match.start() >= place else match[0], content)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_interrupts_and_the_next_start_continues(number: signal.Signals, recipe: list[str], tmp_path: Path):
    """It says so, without a word of Python about semaphores, and the result is that of a preparation without a signal."""
    words = [*recipe, "data.num_workers=2", "data.shard_megabytes=0.005"]
    command = [sys.executable, "-m", "dsllm", "prepare", *words]
    assert main([*words, f"data.directory={tmp_path}/fresh"]) == 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data.partial" / "records").glob("train-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (75, "interrupted: start the same command again to continue\n")
    assert not (tmp_path / "data").exists() and not (tmp_path / "data.partial.lock").exists()
    assert main(words) == 0
    for path in (tmp_path / "fresh").glob("*.[bi][id][nx]"):
        assert (tmp_path / "data" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["| head -n 1; exit ${PIPESTATUS[0]}", ">/dev/full"])
def test_a_reader_that_leaves_does_not_end_the_work(output: str, recipe: list[str], tmp_path: Path):
    words = shlex.join([sys.executable, "-m", "dsllm", "prepare", *recipe])
    done = subprocess.run(["bash", "-c", f"{words} {output}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_manifest(tmp_path / "data").tokenizer.vocab_size == 300
