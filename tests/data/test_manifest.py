"""Training uses the shards and tokenizer that were prepared; others are refused by name, without reading the corpus."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsllm.config.data import DataConfig, SourceConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.data.manifest import (
    CHECKSUM_FILE,
    FILE_NAME,
    check_shards,
    check_tokenizer,
    hash_of,
    load_manifest,
    settings_of,
    wait_for_manifest,
    write_manifest,
)
from dsllm.data.verify import check_content, hashed_shards
from dsllm.errors import DataError
from tests.helpers.damage import NO_FILES, put_in_place
from tests.helpers.prepared import counting_documents, write_prepared, write_shard

SHARD = "train-a-00000"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_prepared(tmp_path, {"a": [counting_documents(100)]}, {"a": [counting_documents(20)]})
    return tmp_path


def run_with(**data: object) -> RunConfig:
    return RunConfig(run=RunSection(name="r"), data=DataConfig(**data))


def test_a_manifest_is_read_back_as_it_was_written(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    write_manifest(prepared, manifest)
    assert load_manifest(prepared) == manifest
    check_shards(prepared, manifest)
    check_tokenizer(prepared, manifest)


def test_a_directory_that_is_not_prepared_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `dsllm prepare CONFIG`"):
        load_manifest(tmp_path)


def change_manifest(directory: Path, change: Callable[[str], str], *, checksum: bool = True) -> None:
    """Change the text of a manifest, with its checksum or, as damage does, without."""
    path = directory / FILE_NAME
    path.write_text(change(path.read_text()))
    if checksum:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (directory / CHECKSUM_FILE).write_text(f"{digest}  {FILE_NAME}\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "not a manifest"),
        (lambda text: "[]", "not a manifest"),
        (lambda text: "", "not a manifest"),
        (lambda text: "[" * 100_000, "not a manifest"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "format version 9.*update dsllm"),
        (lambda text: text.replace('"format_version": 1', '"format_version": true'), "format version True"),
        (lambda text: text.replace('"vocab_size"', '"vocab"'), r"damaged: tokenizer\.vocab"),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": 1, "new": 1'),
            "damaged: new: .*update dsllm",
        ),
        (lambda text: text.replace('"vocab_size": 60000', '"vocab_size": 0'), "end_of_text_id 0 of vocab_size 0"),
        (lambda text: text.replace('"vocab_size": 60000', f'"vocab_size": {10**12}'), "of vocab_size 1000000000000"),
        (lambda text: text.replace('"end_of_text_id": 0', '"end_of_text_id": -1'), "end_of_text_id -1"),
        (lambda text: text.replace('"num_tokens": 100', '"num_tokens": -100'), "num_tokens=-100"),
        (lambda text: text.replace('"num_tokens": 100', f'"num_tokens": {10**15}'), "cannot be"),
        (lambda text: text.replace('"first_token": 0', '"first_token": -5'), "first_token=-5"),
        (
            lambda text: text.replace('"name": "a"', '"name": "a", "train": [], "validation": []}, {"name": "a"'),
            "sources",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(prepared: Path, change: Callable[[str], str], message: str) -> None:
    change_manifest(prepared, change)
    with pytest.raises(DataError, match=message) as refusal:
        load_manifest(prepared)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_flipped_bit_of_a_manifest_changes_what_is_read(prepared: Path, count: int) -> None:
    """Single bits at random places, in the manifest and in its checksum: every one is refused."""
    source = random.Random(9)
    for name in (FILE_NAME, CHECKSUM_FILE):
        path = prepared / name
        content = path.read_bytes()
        bits = range(8 * len(content))
        for bit in source.sample(bits, min(count, len(bits))):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"manifest\.json"):
                load_manifest(prepared)
        path.write_bytes(content)
    load_manifest(prepared)


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.long)])
def test_any_wrong_value_is_a_named_error_or_is_read(prepared: Path, count: int) -> None:
    """Somebody writes values of other types, or removes members, with the right checksum; the checks of a start follow."""
    source, original = random.Random(10), (prepared / FILE_NAME).read_text()
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        10**30,
        1e308,
        "",
        "../x",
        "/dev/zero",
        "\0",
        ".",
        [],
        {},
        [[]],
        {"a": 1},
    ]

    def change(text: str) -> str:
        raw = node = json.loads(text)
        while True:
            key = source.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and source.random() < 0.8:
                node = node[key]
                continue
            if source.random() < 0.3:
                del node[key]
            else:
                node[key] = source.choice(values)
            return json.dumps(raw)

    for _ in range(count):
        (prepared / FILE_NAME).write_text(original)
        change_manifest(prepared, change)
        try:
            manifest = load_manifest(prepared)
            check_tokenizer(prepared, manifest)
            check_shards(prepared, manifest)
            check_content(prepared, hashed_shards(manifest))
        except DataError:
            continue


@pytest.mark.parametrize("name", [FILE_NAME, CHECKSUM_FILE])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_and_not_opened(prepared: Path, name: str, kind: str) -> None:
    path = prepared / name
    put_in_place(path, kind)
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(prepared)


def test_the_checksum_is_one_that_sha256sum_checks(prepared: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUM_FILE], cwd=prepared, check=True)


def test_data_of_an_older_version_has_no_checksum(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    (prepared / CHECKSUM_FILE).unlink()
    assert load_manifest(prepared) == manifest


def test_a_truncated_shard_is_refused(prepared: Path) -> None:
    path = prepared / f"{SHARD}.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-a-00000\.bin: 198 bytes, .* describes 200"):
        check_shards(prepared, load_manifest(prepared))


def test_every_wrong_shard_is_listed(prepared: Path) -> None:
    for path in prepared.glob("*.bin"):
        path.unlink()
    with pytest.raises(DataError) as error:
        check_shards(prepared, load_manifest(prepared))
    assert "train-a-00000.bin" in str(error.value) and "validation-a-00000.bin" in str(error.value)


def test_another_shard_in_its_place_is_refused(prepared: Path) -> None:
    write_shard(prepared, SHARD, counting_documents(150), 60000)
    with pytest.raises(DataError, match="not the shard that was prepared"):
        check_shards(prepared, load_manifest(prepared))


def test_a_shard_of_another_type_is_refused(prepared: Path) -> None:
    write_shard(prepared, SHARD, counting_documents(50), 10**6)  # half the tokens of twice the size
    with pytest.raises(DataError, match="ids of type int32, the manifest says uint16"):
        check_shards(prepared, load_manifest(prepared))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_each_shard_is_checked_by_one_rank(tmp_path: Path, num_ranks: int) -> None:
    documents = {"a": [counting_documents(20)] * 3, "b": [counting_documents(20)] * 2}
    manifest = write_prepared(tmp_path, documents)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    lines = []
    for rank in range(num_ranks):
        try:
            check_shards(tmp_path, manifest, rank, num_ranks)
        except DataError as error:
            lines += str(error).splitlines()
    assert len(lines) == 5 and all(sum(record.prefix in line for line in lines) == 1 for record in manifest.records())


@pytest.mark.parametrize("name", ["../other", "/other", "tokenizer/../../other", "", ".", "a\\b"])
def test_a_tokenizer_outside_the_folder_is_refused(prepared: Path, name: str) -> None:
    manifest = load_manifest(prepared)
    tokenizer = dataclasses.replace(manifest.tokenizer, directory=name)
    write_manifest(prepared, dataclasses.replace(manifest, tokenizer=tokenizer))
    with pytest.raises(DataError, match="outside its folder"):
        load_manifest(prepared)


def test_a_shard_outside_the_folder_is_refused_unless_its_path_is_absolute(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    for prefix, allowed in (("../a", False), ("/corpora/a", True)):
        record = dataclasses.replace(manifest.sources[0].train[0], prefix=prefix)
        source = dataclasses.replace(manifest.sources[0], train=(record,))
        write_manifest(prepared, dataclasses.replace(manifest, sources=(source,)))
        if allowed:
            assert load_manifest(prepared).sources[0].train[0].prefix == prefix
        else:
            with pytest.raises(DataError, match="outside its folder"):
                load_manifest(prepared)


def test_a_range_beyond_the_shard_is_refused(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    record = dataclasses.replace(manifest.sources[0].train[0], first_token=50)
    source = dataclasses.replace(manifest.sources[0], train=(record,))
    with pytest.raises(DataError, match="100 tokens, but the manifest uses it up to token 150"):
        check_shards(prepared, dataclasses.replace(manifest, sources=(source,)))


def test_a_tokenizer_that_does_not_match_the_shards_is_refused(prepared: Path) -> None:
    (prepared / "tokenizer" / "tokenizer.json").write_text("{ }")
    with pytest.raises(DataError, match="does not match the shards"):
        check_tokenizer(prepared, load_manifest(prepared))


def test_a_missing_tokenizer_is_named(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    tokenizer = dataclasses.replace(manifest.tokenizer, directory="elsewhere")
    with pytest.raises(DataError, match="elsewhere"):
        check_tokenizer(prepared, dataclasses.replace(manifest, tokenizer=tokenizer))


def test_settings_are_what_decides_the_content() -> None:
    base = settings_of(run_with())
    assert base == json.loads(json.dumps(base))
    assert settings_of(run_with(sequence_length=8)) == base
    assert settings_of(run_with(num_workers=3)) == base
    weighted = DataConfig().sources[0]
    assert settings_of(run_with(sources=(dataclasses.replace(weighted, weight=2.0),))) == base
    for change in ({"validation_share": 0.5}, {"deduplicate": False}, {"sources": (SourceConfig(name="other"),)}):
        assert hash_of(settings_of(run_with(**change))) != hash_of(base)


def test_waiting_ends_when_another_rank_has_prepared(tmp_path: Path) -> None:
    def prepare() -> None:
        time.sleep(0.05)
        write_prepared(tmp_path, {"a": [counting_documents(10)]})

    other = threading.Thread(target=prepare)
    other.start()
    manifest = wait_for_manifest(tmp_path, {}, seconds=10)
    other.join()
    assert manifest.sources[0].train[0].num_tokens == 10


def test_waiting_in_vain_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        wait_for_manifest(tmp_path, {}, seconds=0)
    write_prepared(tmp_path, {"a": [counting_documents(10)]})
    with pytest.raises(DataError, match="other settings"):
        wait_for_manifest(tmp_path, {"other": 1}, seconds=0)


def test_the_check_reads_no_corpus(prepared: Path) -> None:
    """A file of holes that has the right size passes the check, so the check has looked at the size only."""
    path = prepared / f"{SHARD}.bin"
    size = path.stat().st_size
    path.write_bytes(b"")
    os.truncate(path, size)
    check_shards(prepared, load_manifest(prepared))
