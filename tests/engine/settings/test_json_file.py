"""Reading a DeepSpeed JSON."""

from pathlib import Path

import pytest

from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.errors import ConfigError


def refusal(folder: Path, text: str) -> str:
    path = folder / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_json(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is not readable JSON"),
        ("[1]", "contains a list; it must be an object"),
        ('{"a": {"stage": 1, "stage": 2, "b": 0}}', "key given twice: stage"),
        ('{"steps_per_print": NaN}', "NaN is not a finite number: write a number, or leave the key out"),
        ('{"steps_per_print": Infinity}', "Infinity is not a finite number"),
        ('{"aio": {"block_size": -Infinity}}', "-Infinity is not a finite number"),
        ('{"steps_per_print": 1e999}', "1e999 is not a finite number"),
    ],
)
def test_a_file_that_is_no_deepspeed_json(tmp_path, text, says):
    assert says in refusal(tmp_path, text)


def test_a_missing_file_says_where_it_was_looked_for():
    with pytest.raises(ConfigError, match=r"absent\.json .looked in the working directory"):
        read_deepspeed_json("absent.json", Path("/tmp"))


def test_a_file_next_to_the_run_is_found(tmp_path):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"reduce_bucket_size": 5e7}}')
    assert read_deepspeed_json("own.json", tmp_path) == {"zero_optimization": {"reduce_bucket_size": 50_000_000}}


@pytest.mark.parametrize(
    "text, says",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 20_000, "nested too deeply"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "is not readable JSON"),
        (" " * (2**20 + 1), "bytes long; at most"),
    ],
    ids=["brackets", "objects", "digits", "long"],
)
def test_absurd_files_end_in_words(tmp_path, text, says):
    assert says in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "name, hint",
    [("zero2", "ds_configs/zero2.json"), ("ds_configs/zero_2.json", "ds_configs/zero2.json"), ("zzz.json", "")],
)
def test_a_shipped_file_is_suggested(name, hint):
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_json(name)
    assert str(caught.value).endswith(f"; did you mean '{hint}'?" if hint else ")")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: name a DeepSpeed JSON in it"):
        read_deepspeed_json(str(tmp_path))
