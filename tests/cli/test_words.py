"""`RUN.yaml key=value ...`: which word is the run's file, and which are overrides, in every command that takes a run."""

import re
from pathlib import Path

import pytest

from dsllm.cli import run_command
from dsllm.cli.words import RunWords, parse_run_words
from dsllm.errors import EXIT_USAGE, ConfigError

FOLDER = "sweep/lr=3e-4"
COMMANDS = {  # each refuses this run before it starts anything
    "prepare": [],
    "train": ["--dry-run"],
    "launch": ["--dry-run"],
    "doctor": [],
}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run in a folder whose name contains "=", seen from the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "run.yaml").write_text("run: {name: found-it}\ntrain: {total_tokens: -1}\n")
    return f"{FOLDER}/run.yaml"


@pytest.mark.parametrize(
    "word",
    [
        "train.total_tokens=2e6",
        "data.sources.0.paths=[a=b]",
        "data.directory=/x/y=z",
        "run.name = spaced",
        "deepspeed=",
        "data.sources=" + "x" * 5000,  # longer than a file's name may be
        "run.name=two\nlines",
    ],
)
def test_a_word_with_a_path_of_identifiers_before_the_equals_sign_is_an_override(word):
    assert parse_run_words([word]) == RunWords(overrides=(word,))


def test_the_file_may_stand_anywhere_and_overrides_keep_their_order():
    words = parse_run_words(["b.c=1", "run.yaml", "a=2"])
    assert words == RunWords(file="run.yaml", overrides=("b.c=1", "a=2"))
    assert parse_run_words([]) == RunWords()


def test_an_existing_file_wins_over_an_override(sweep, tmp_path):
    assert parse_run_words([sweep, "a.b=1"]) == RunWords(file=sweep, overrides=("a.b=1",))
    (tmp_path / "lr=3e-4.yaml").write_text("")  # its name has the form of an override
    assert parse_run_words(["lr=3e-4.yaml"]).file == "lr=3e-4.yaml"


def test_a_word_that_is_neither_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'sweep/lr=1/run.yaml': there is no such file, .* key\.path=value"):
        parse_run_words(["sweep/lr=1/run.yaml"])


def test_several_files_are_refused_also_when_an_option_gives_one():
    with pytest.raises(ConfigError, match=r"there are 2: c\.yaml, a\.yaml"):
        parse_run_words(["a.yaml"], "c.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_finds_a_file_whose_path_contains_an_equals_sign(sweep, command, capsys):
    assert run_command(command, [sweep, "train.global_batch_sequences=0", *COMMANDS[command]]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert f"{FOLDER}/run.yaml:2: train.total_tokens: must be above 0" in error
    assert "override 'train.global_batch_sequences=0'" in error


@pytest.mark.parametrize(
    ("word", "example"),
    [
        ("train.total_tokens", "train.total_tokens=VALUE"),
        ("data.sources[0].weight=2", "data.sources.0.weight=2"),
        ("data.sources[0].weight", "data.sources.0.weight=VALUE"),
    ],
)
def test_a_field_that_is_written_otherwise_is_corrected(word, example):
    for words in ([word], ["run.yaml", word]):
        with pytest.raises(ConfigError, match=rf"for example {re.escape(example)}$"):
            parse_run_words(words)


@pytest.mark.parametrize("word", ["run.yaml", "data.yml", "train.json", "model/x", "."])
def test_a_file_may_be_called_as_a_section_is(word):
    assert parse_run_words([word]).file == word
