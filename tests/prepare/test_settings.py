"""Changed settings are listed one per line, by their dotted keys."""

import dataclasses
from pathlib import Path

from dsllm.config.data import DataConfig
from dsllm.data.manifest import settings_of
from dsllm.prepare.settings import other_settings, reads_default_corpus
from tests.helpers.preparing import golden_run, prepared


def test_one_changed_word_is_one_line(tmp_path: Path):
    manifest, _, _ = prepared(golden_run(), tmp_path / "data")
    config = golden_run()
    (source,) = config.data.sources
    changed = dataclasses.replace(source, paths=("other.txt",), encoding="latin-1")
    now = settings_of(dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(changed,))))
    assert str(other_settings(tmp_path / "data", manifest, now)).splitlines() == [
        f"{tmp_path}/data was prepared with other settings:",
        f"  sources.0.paths.0: was {source.paths[0]!r}, now 'other.txt'",
        "  sources.0.encoding: was None, now 'latin-1'",
        "undo the change, set another data.directory, or replace it by `dsllm prepare CONFIG --force`",
    ]


def test_a_field_that_came_later_leaves_older_data_valid():
    """The settings of version 0.1.0 had no encoding."""
    (source,) = settings_of(golden_run())["sources"]
    assert "encoding" not in source and "weight" not in source and source["on_bad_input"] == "error"


def test_the_default_corpus():
    assert reads_default_corpus(DataConfig()) and not reads_default_corpus(golden_run().data)
