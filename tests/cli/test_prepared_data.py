"""Training uses prepared data as it is, prepares what is not there, and says in few words what differs."""

import dataclasses
from pathlib import Path

import pytest

from dsllm.cli.prepared_data import is_prepared, prepared_data
from dsllm.config.data import DataConfig
from dsllm.config.run import RunConfig
from dsllm.data.manifest import hash_of, settings_of, write_manifest
from dsllm.engine.processes.ranks import discover_ranks
from dsllm.errors import DataError
from tests.helpers.preparing import golden_run, with_tokenizer


def golden_in(folder: Path) -> RunConfig:
    config = golden_run()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, directory=str(folder / "data")))


def test_data_is_prepared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = prepared_data(golden_in(tmp_path), discover_ranks({}))
    assert f"{tmp_path}/data is not prepared yet: preparing it now" in capsys.readouterr().out
    assert prepared_data(golden_in(tmp_path), discover_ranks({})) == first
    assert capsys.readouterr().out == ""


def test_changed_settings_are_listed_one_per_line(tmp_path: Path):
    prepared_data(golden_in(tmp_path), discover_ranks({}))
    with pytest.raises(DataError) as caught:
        prepared_data(with_tokenizer(golden_in(tmp_path), vocab_size=321), discover_ranks({}))
    assert "\n  tokenizer.vocab_size: was 320, now 321\n" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_run_without_sources_says_which_corpus_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = golden_in(tmp_path)
    manifest = prepared_data(config, discover_ranks({}))
    assert "the corpus is" not in capsys.readouterr().out
    default = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=DataConfig().sources))
    settings = settings_of(default)  # as if the embedded corpus, which takes seconds, had been prepared
    changed = dataclasses.replace(manifest, settings=settings, settings_sha256=hash_of(settings))
    write_manifest(tmp_path / "data", changed)
    for rank in range(2):
        prepared_data(default, dataclasses.replace(discover_ranks({}), rank=rank, world_size=2))
    line = "the corpus is the text that every Python installation has: name your own text in data.sources\n"
    assert capsys.readouterr().out == line, "said once, by rank 0"


def test_a_data_directory_that_cannot_be_looked_into_is_named(tmp_path: Path):
    (tmp_path / "circle").symlink_to("circle")
    for name, reason in (
        (str(tmp_path / "circle"), "Too many levels"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
    ):
        config = golden_run(directory=name)
        with pytest.raises(DataError, match=f"data.directory .*: cannot be looked into: .*{reason}"):
            is_prepared(config)
    (tmp_path / "file").touch()
    for name in ("none", "file", "file/x"):
        assert not is_prepared(golden_run(directory=str(tmp_path / name)))
