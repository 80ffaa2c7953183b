"""~ and variables in paths, and where files are looked for."""

from pathlib import Path

import pytest

from dsllm.config.load import load_run, run_from_dict, run_to_dict
from dsllm.config.paths import expanded, searched
from dsllm.errors import ConfigError

FIELDS = {  # with what a run needs to have the field
    "run.directory": [],
    "data.directory": [],
    "data.sources.0.paths.0": ["data.sources=[{name: a, paths: [x]}]"],
    "data.sources.0.dataset": ["data.sources=[{name: a, kind: dataset, dataset: x}]"],
    "tokenizer.path": ["tokenizer.kind=pretrained"],
    "model.init_from": [],
    "deepspeed": [],
}


def value_of(run, field: str):
    value = run_to_dict(run)
    for key in field.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


@pytest.mark.parametrize("field", FIELDS)
def test_every_path_of_a_run_takes_home_and_variables(field, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for text, expected in {
        "~/x": "/home/me/x",
        "${SCRATCH}/x": "/scratch/x",
        "$SCRATCH/${SCRATCH}": "/scratch//scratch",
        "a~b/$": "a~b/$",
    }.items():
        assert value_of(load_run(None, [*FIELDS[field], f"{field}={text}"]), field) == expected


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("${NOT_SET_HERE}/x", "${NOT_SET_HERE} is not set here"),
        ("$NOT_SET_HERE", "${NOT_SET_HERE} is not set here"),
        ("~nobody-of-that-name/x", "there is no user 'nobody-of-that-name' here"),
        ("$EMPTY", "is empty, because its variables are"),
        ('"a\\0b"', "contains no NUL"),
        ("a/" + "x" * 256, "is too long for the name of a file"),
        ("a/" * 2001, "is too long for the name of a file"),
    ],
)
def test_what_cannot_be_replaced_is_refused_by_name(field, text, says, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*FIELDS[field], f"{field}={text}"])
    assert any(f"{field}: " in problem and says in problem for problem in caught.value.problems)


def test_a_saved_run_keeps_its_paths():
    saved = run_to_dict(load_run(None))
    saved["run"]["directory"] = "~/$NOT_SET_HERE"
    assert run_from_dict(saved, "checkpoint").run.directory == "~/$NOT_SET_HERE"


def test_expansion_says_nothing_where_there_is_nothing_to_replace():
    assert expanded("runs/a b") == ("runs/a b", "")


def test_a_folder_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = searched("x.yaml", Path("."))
    assert text.startswith("x.yaml (looked in the working directory, /") and text.count(",") == 1
    assert searched("x.yaml", tmp_path / "b").count(",") == 2
    assert searched("/x.yaml") == "/x.yaml"
