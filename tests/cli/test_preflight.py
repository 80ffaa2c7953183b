"""A dry run refuses what the run would be refused for, and counts the vocabulary that the run will have; it writes nothing."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from dsllm.cli import run_command
from dsllm.cli.preflight import prepared_data_of, saved_run_in, vocabulary_of
from dsllm.config.load import load_run, run_to_dict
from dsllm.config.yaml_file import write_yaml
from dsllm.run_directory import RUN_FILE, lock_run, write_status
from tests.helpers.saved_run import prepare_golden, save_run
from tests.helpers.tiny_job import tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a run that has trained: its data, its directory with one checkpoint, and its YAML."""
    folder = tmp_path_factory.mktemp("trained")
    config = prepare_golden(folder)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))
    directory, _ = save_run(config, "bf16")
    (directory / RUN_FILE).write_text(write_yaml(run_to_dict(config)))
    (folder / "run.yaml").write_text(write_yaml(run_to_dict(config)))
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    return folder


def dry_run(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and output of a dry run, which must leave the folder as it was."""
    before = tree(folder)
    code = run_command("train", [str(folder / "run.yaml"), *words, "--dry-run"])
    assert tree(folder) == before
    captured = capsys.readouterr()
    return code, captured.out + captured.err


REFUSED = {
    "another seed": (["run.seed=9"], "run.seed: saved "),
    "another precision": (["train.precision=fp32"], "train.precision: saved 'bf16', now 'fp32'"),
    "other data settings": (["data.validation_share=0.3"], "validation_share: was "),
    "a vocabulary below the tokenizer's": (["model.vocab_size=128"], "model.vocab_size 128 is smaller than the 320 ids"),
    "a data directory with other files": (["data.directory=FOLDER/other"], "contains other files and no prepared data"),
    "a data directory that is a file": (["data.directory=FOLDER/run.yaml"], "is a file"),
    "a run directory that is a file": (["run.directory=FOLDER/run.yaml"], "is not a folder"),
    "a run directory below a file": (["run.directory=FOLDER/run.yaml/x"], "run.yaml is not a folder"),
    "a run directory where none can be": (["run.directory=/proc/x"], "cannot be written: nothing can be created in /proc"),
    "a name that is too long": (["run.directory=" + "x" * 300], "too long for the name of a file"),
    "Liger on the CPU": (["train.kernels=liger"], "has no Triton"),
    "a tokenizer that is not there": (
        ["data.directory=FOLDER/new", "tokenizer={kind: pretrained, path: absent.json}", "model.vocab_size=null"],
        "absent.json: no such file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_run_would_be_refused_for(folder, capsys, case):
    words, says = REFUSED[case]
    code, output = dry_run(folder, capsys, *(word.replace("FOLDER", str(folder)) for word in words))
    assert code != 0 and says in output and "Traceback" not in output, output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(folder, capsys):
    code, output = dry_run(folder, capsys, "run.directory=/root/x")
    assert code != 0 and "cannot be written" in output


def test_the_run_itself_passes_and_continues_in_its_precision(folder, capsys):
    code, output = dry_run(folder, capsys, "train.precision=auto", "--brief")
    assert code == 0 and "ZeRO stage 1, bf16" in output and "warning" not in output, output
    assert output.startswith("# parameters") and "# corpus       golden (files)" in output
    run = saved_run_in(folder / "run")
    assert run is not None and run.train.precision == "bf16"
    assert saved_run_in(folder / "other") is None


def test_a_device_that_is_not_here_can_be_planned_for(folder, capsys):
    new = ["run.directory=new", "train.precision=fp16", "--world-size", "2", "train.micro_batch_sequences=1", "--brief"]
    code, output = dry_run(folder, capsys, *new, "train.device=cuda")
    assert code == 0 and "2 ranks on cuda, ZeRO stage 1, fp16" in output, output
    code, output = dry_run(folder, capsys, *new, "--device", "cpu")
    assert code != 0 and "has no fp16" in output


def test_what_may_change_until_the_start_is_a_warning(folder, capsys, tmp_path):
    lock = lock_run(tmp_path / "live", print)
    try:
        code, output = dry_run(folder, capsys, f"run.directory={tmp_path}/live")
    finally:
        lock.release()
    assert code == 0 and "# warning      refused now: " in output and "a run is alive here" in output
    write_status(tmp_path / "live", "finished", tokens=5, step=1)
    assert "finished" not in dry_run(folder, capsys, f"run.directory={tmp_path}/live")[1]
    write_status(tmp_path / "live", "finished", tokens=5, step=10**6)
    assert "has a finished run of 5 tokens" in dry_run(folder, capsys, f"run.directory={tmp_path}/live")[1]
    new = [f"data.directory={tmp_path}/new", "data.sources=[{name: a, paths: [absent/*.txt, run.yaml]}]"]
    (tmp_path / "r").mkdir()
    code, output = dry_run(folder, capsys, f"run.directory={tmp_path}/r", *new, "train.optimizer.learning_rate=50")
    assert code == 0 and "source 'a': absent/*.txt is not here" in output and "50 is far above" in output


def test_warnings_are_in_the_json(folder, capsys, tmp_path):
    words = ["run.directory=new", "train.schedule={warmup_steps: 1e6}", "--json", str(tmp_path / "plan.json")]
    assert dry_run(folder, capsys, *words)[0] == 0
    (warning,) = json.loads((tmp_path / "plan.json").read_text())["warnings"]
    assert warning.startswith("train.schedule.warmup_steps: ")


def test_a_pretrained_tokenizer_counts_with_its_own_vocabulary(tmp_path):
    file = tmp_path / "tokenizer.json"
    words = {f"w{i}": i for i in range(5000)} | {"<|endoftext|>": 5000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(file))
    overrides = [f"data.directory={tmp_path}/new", f"tokenizer={{kind: pretrained, path: {file}}}"]
    runs = [load_run(None, overrides), load_run(None, [*overrides, "model.vocab_size=6000"])]
    found = [vocabulary_of(run, prepared_data_of(run)) for run in runs]
    assert found == [(5001, f"vocabulary of {file}"), (6000, "vocabulary as given")]
