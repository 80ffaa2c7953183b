"""The tokenizer of a saved model is found, starts and ends texts as in training, and is compared with that of a text."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.config.run import RunConfig
from dsllm.data.manifest import load_manifest
from dsllm.errors import DataError
from dsllm.evaluate.load import open_saved
from dsllm.evaluate.model_tokenizer import find_tokenizer, open_tokenizer
from tests.helpers.models import CONTEXT
from tests.helpers.saved_run import prepare_golden, save_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with prepared data."""
    return prepare_golden(tmp_path_factory.mktemp("golden"))


def into(config: RunConfig, directory: Path) -> RunConfig:
    """The same run with its directory elsewhere."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(directory)))


def test_the_tokenizer_is_found_with_the_data_next_to_the_run_or_at_the_given_path(config: RunConfig, tmp_path: Path):
    directory, _ = save_run(into(config, tmp_path / "run"))
    saved = open_saved(directory, print)
    prepared = Path(config.data.directory or "")
    assert find_tokenizer(saved) == find_tokenizer(saved, prepared) == prepared / "tokenizer"
    shutil.copytree(prepared / "tokenizer", directory / "tokenizer")
    assert find_tokenizer(saved) == directory / "tokenizer"
    with pytest.raises(DataError, match="--data"):
        find_tokenizer(saved, tmp_path)


def test_the_tokenizer_of_an_export_ends_texts_with_the_same_token(config: RunConfig, tmp_path: Path):
    directory, _ = save_run(into(config, tmp_path / "run"))
    saved = open_saved(directory, print)
    ours = open_tokenizer(find_tokenizer(saved))
    export = Export(config=saved.config, context_length=CONTEXT, end_of_text_id=0, tokenizer=find_tokenizer(saved))
    export_hugging_face(saved.reader, export, tmp_path / "hf")
    theirs = open_tokenizer(find_tokenizer(open_saved(tmp_path / "hf", print)))
    assert (theirs.end_of_text, theirs.end_of_text_id) == (ours.end_of_text, ours.end_of_text_id)
    assert theirs.encode("To be, or not") == ours.encode("To be, or not")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_runs_own_tokenizer_must_be_the_one_it_was_trained_with(config: RunConfig, tmp_path: Path):
    data = Path(config.data.directory or "")
    sha256 = load_manifest(data).tokenizer.sha256
    directory, _ = save_run(into(config, tmp_path / "run"), fields={"tokenizer_sha256": sha256})
    own = directory / "tokenizer"
    saved = open_saved(directory, print)

    def restore() -> None:
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(data / "tokenizer", own)

    restore()
    assert find_tokenizer(saved) == own
    for damage in (
        lambda: flip(next(own.glob("tokenizer*"))),
        lambda: (own / "more.json").write_text("{}"),
        lambda: [path.unlink() for path in own.iterdir()],
        lambda: (own / "link").symlink_to("/etc/passwd"),
        lambda: (own / "folder").mkdir(),
        lambda: os.mkfifo(own / "fifo"),
    ):
        restore()
        damage()
        with pytest.raises(DataError, match="tokenizer"):
            find_tokenizer(saved)
        assert find_tokenizer(saved, data) == data / "tokenizer"


def test_the_tokenizer_of_prepared_data_is_checked(config: RunConfig, tmp_path: Path):
    directory, _ = save_run(into(config, tmp_path / "run"))
    shutil.copytree(config.data.directory or "", data := tmp_path / "data")
    flip(next((data / "tokenizer").glob("tokenizer*")))
    with pytest.raises(DataError, match="does not match the shards"):
        find_tokenizer(open_saved(directory, print), data)
