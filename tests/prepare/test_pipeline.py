"""Preparing always gives the same bytes, continues after an interruption, and replaces only what it may."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil
import pytest

from dsllm.config.data import DataConfig, SourceConfig, TokenizerConfig
from dsllm.config.run import RunConfig
from dsllm.data.manifest import check_shards, check_tokenizer, load_manifest
from dsllm.data.shards import Shard, bin_path
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import DataError
from dsllm.files import sha256_of_file
from dsllm.prepare.pipeline import prepare
from tests.helpers.preparing import GOLDEN, golden_run, prepared, tiny_run, with_tokenizer, write_jsonl


def contents(directory: Path) -> dict[str, str]:
    """Checksums of everything that was prepared, except for the data card, which contains times."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "data_card.json"]
    return {str(path.relative_to(directory)): sha256_of_file(path) for path in files}


def texts_in(directory: Path, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    manifest = load_manifest(directory)
    tokenizer = load_tokenizer(directory / manifest.tokenizer.directory)
    texts = []
    for record in (record for source in manifest.sources for record in getattr(source, split)):
        shard = Shard(directory / record.prefix)
        ids = shard.read(record.first_token, record.first_token + record.num_tokens).tolist()
        while ids:
            end = ids.index(manifest.tokenizer.end_of_text_id)
            texts.append(tokenizer.decode(ids[:end]))
            ids = ids[end + 1 :]
    return texts


def test_the_golden_text_gives_the_golden_shards(tmp_path: Path):
    """Numbers of one text and the pinned tokenizers; they change only when what is prepared changes."""
    manifest, card, _ = prepared(golden_run(shard_megabytes=64), tmp_path / "data")
    (source,) = manifest.sources
    (train,), (held_out,) = source.train, source.validation
    assert (train.num_documents, train.num_tokens, train.text_bytes) == (809, 71199, 106887)
    assert (held_out.num_documents, held_out.num_tokens, held_out.text_bytes) == (103, 7507, 11273)
    assert Shard(tmp_path / "data" / train.prefix).read(0, 8).tolist() == [38, 302, 308, 221, 35, 271, 73, 90]
    content = (tmp_path / "data" / "train-golden-00000.bin").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "61d1a3aec87f12108c28345584e16f17606e96446776190481ece64a63fb4eb2"
    assert train.bin_sha256 == hashlib.sha256(content).hexdigest()
    assert card["splits"]["train"]["tokens"] == train.num_tokens


def test_the_shards_contain_what_was_read(tmp_path: Path):
    manifest, card, _ = prepared(golden_run(), tmp_path / "data")
    speeches = [speech for speech in GOLDEN.read_text().split("\n\n") if speech.strip()]
    speeches = list(dict.fromkeys(speech.rstrip("\n") for speech in speeches))
    train, held_out = texts_in(tmp_path / "data", "train"), texts_in(tmp_path / "data", "validation")
    order = {speech: n for n, speech in enumerate(speeches)}
    assert sorted([*train, *held_out], key=order.__getitem__) == speeches
    assert train == sorted(train, key=order.__getitem__)
    assert len(manifest.sources[0].train) > 1
    read = card["sources"][0]["read"]
    assert read["documents"] == read["kept"] + read["duplicates"] + read["empty"] + read["bad"]
    assert (
        read["kept"]
        == len(speeches)
        == card["splits"]["train"]["documents"] + card["splits"]["validation"]["documents"]
    )
    text_bytes = sum(len(text.encode()) for text in held_out)
    ids = card["splits"]["validation"]["tokens"] - len(held_out)
    assert card["splits"]["validation"]["bytes"] == card["baselines"]["num_bytes"] == text_bytes
    assert card["tokenizer"]["held_out_bytes_per_token"] == text_bytes / ids
    check_shards(tmp_path / "data", manifest)
    for record in manifest.records():
        assert record.bin_sha256 == sha256_of_file(bin_path(tmp_path / "data" / record.prefix))
    check_tokenizer(tmp_path / "data", manifest)


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_the_number_of_workers_does_not_change_a_byte(pretrained: bool, tmp_path: Path):
    """Also where shards are written while the sources are still being read, as with a loaded tokenizer."""
    config = golden_run()
    if pretrained:
        prepare(config, tmp_path / "for-tokenizer", lambda line: None)
        config = with_tokenizer(config, kind="pretrained", path=str(tmp_path / "for-tokenizer" / "tokenizer"))
    for workers in (1, 3):
        data = dataclasses.replace(config.data, num_workers=workers)
        prepare(dataclasses.replace(config, data=data), tmp_path / str(workers), lambda line: None)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) > 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece_unigram", "sentencepiece_bpe"])
def test_sentencepiece_shards_hold_the_same_documents(kind: str, tmp_path: Path):
    _, card, _ = prepared(with_tokenizer(golden_run(), kind=kind, vocab_size=400), tmp_path / "a")
    prepare(golden_run(), tmp_path / "b", lambda line: None)
    for split in ("train", "validation"):
        assert texts_in(tmp_path / "a", split) == texts_in(tmp_path / "b", split)
    assert card["tokenizer"]["held_out_documents_not_round_trip"] == 0


def test_prepared_data_is_left_alone(tmp_path: Path):
    manifest, _, _ = prepared(golden_run(), tmp_path / "data")
    before = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    again, _, lines = prepared(golden_run(num_workers=2, sequence_length=64), tmp_path / "data")
    assert again == manifest and "prepared already" in lines[0]
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == before


def test_other_settings_are_refused_with_the_difference_unless_forced(tmp_path: Path):
    prepare(golden_run(), tmp_path / "data", lambda line: None)
    before = contents(tmp_path)
    other = with_tokenizer(golden_run(validation_share=0.2), vocab_size=300)
    with pytest.raises(DataError) as caught:
        prepare(other, tmp_path / "data", lambda line: None)
    for part in (
        "tokenizer.vocab_size: was 320, now 300",
        "validation_share: was 0.1, now 0.2",
        "--force",
        "data.directory",
    ):
        assert part in str(caught.value)
    assert contents(tmp_path) == before
    manifest = prepare(other, tmp_path / "data", lambda line: None, force=True)
    check_shards(tmp_path / "data", manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    prepare(other, tmp_path / "fresh", lambda line: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(DataError, match="contains other files and no prepared data"):
            prepare(golden_run(), folder, lambda line: None, force=force)
    with pytest.raises(DataError, match="is a file"):
        prepare(golden_run(), folder / "thesis.txt", lambda line: None)
    assert list(tmp_path.rglob("*")) == [folder, folder / "thesis.txt"]


def test_an_empty_folder_is_used(tmp_path: Path):
    (tmp_path / "data").mkdir()
    prepare(golden_run(), tmp_path / "data", lambda line: None)
    assert (tmp_path / "data" / "manifest.json").is_file()


def test_a_failed_preparation_leaves_nothing_under_the_name_and_keeps_finished_shards(tmp_path: Path):
    """The last line is bad; once it is fixed, only the unfinished shards are written."""
    prepare(golden_run(), tmp_path / "for-tokenizer", lambda line: None)
    speeches = GOLDEN.read_text().split("\n\n")
    path = write_jsonl(tmp_path / "a.jsonl", speeches[:-1])
    path.write_text(path.read_text() + "{bad\n")
    config = tiny_run(
        [SourceConfig(name="s", paths=(str(tmp_path / "a.jsonl"),))],
        TokenizerConfig(kind="pretrained", path=str(tmp_path / "for-tokenizer" / "tokenizer")),
        shard_megabytes=0.04,
        validation_share=0.1,
    )
    with pytest.raises(DataError, match="not valid JSON"):
        prepare(config, tmp_path / "data", lambda line: None)
    assert not (tmp_path / "data").exists()
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "data.partial").glob("*.bin")}
    assert finished
    write_jsonl(tmp_path / "a.jsonl", speeches)
    _, _, lines = prepared(config, tmp_path / "data")
    assert f"shards: {len(finished)} kept from the interrupted preparation" in lines
    assert finished.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "data").glob("*.bin")}.items()
    prepare(config, tmp_path / "fresh", lambda line: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")
    assert not (tmp_path / "data.partial").exists()


def test_finished_shards_of_other_text_or_another_tokenizer_are_not_used(tmp_path: Path):
    config = golden_run()
    prepare(config, tmp_path / "fresh", lambda line: None)
    prepare(golden_run(validation_share=0.3), tmp_path / "data", lambda line: None)
    (tmp_path / "data" / "records").mkdir()  # as if this one had been interrupted just before the end
    (tmp_path / "data").rename(tmp_path / "data.partial")
    prepare(config, tmp_path / "data", lambda line: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def interrupt_writing(what: str, done: float, total: float | None) -> None:
    if what.startswith("writing"):
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["replaced", "damaged", "removed"])
def test_the_tokenizer_of_an_interrupted_preparation_is_used_only_if_it_is_unchanged(damage: str, tmp_path: Path):
    prepare(golden_run(), tmp_path / "fresh", lambda line: None)
    prepare(with_tokenizer(golden_run(), vocab_size=300), tmp_path / "other", lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        prepare(golden_run(), tmp_path / "data", lambda line: None, interrupt_writing)
    folder = tmp_path / "data.partial" / "tokenizer"
    if damage == "replaced":  # by another interrupted preparation in the same folder
        config = with_tokenizer(golden_run(), kind="pretrained", path=str(tmp_path / "other" / "tokenizer"))
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tmp_path / "data", lambda line: None, interrupt_writing)
    elif damage == "damaged":
        (folder / "tokenizer.json").write_text("")
    else:
        shutil.rmtree(folder)
    _, _, lines = prepared(golden_run(), tmp_path / "data")
    assert not any("tokenizer: kept" in line for line in lines)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def sleep_after_each_shard(what: str, done: float, total: float | None) -> None:
    time.sleep(0.2 if what.startswith("writing") else 0)


def prepare_slowly(config: RunConfig, directory: Path) -> None:
    prepare(config, directory, lambda line: None, sleep_after_each_shard)


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_and_leaves_no_process(tmp_path: Path):
    config = golden_run(num_workers=2, shard_megabytes=0.01)
    prepare(config, tmp_path / "fresh", lambda line: None)
    process = multiprocessing.get_context("spawn").Process(target=prepare_slowly, args=(config, tmp_path / "data"))
    process.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data.partial" / "records").glob("train-*.json")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert workers and not psutil.wait_procs(workers, timeout=10)[1], "workers outlive their parent"
    assert not (tmp_path / "data").exists()
    _, _, lines = prepared(config, tmp_path / "data")
    assert any("tokenizer: kept" in line for line in lines)
    assert any("shards:" in line and "kept" in line for line in lines)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def prepare_with_a_break(config: RunConfig, directory: Path, reached: Event, resume: Event) -> None:
    """Prepare, and wait for `resume` once the first shard is written."""

    def progress(what: str, done: float, total: float | None) -> None:
        if what.startswith("writing") and done > 0 and not reached.is_set():
            reached.set()
            assert resume.wait(60)

    prepare(config, directory, lambda line: None, progress)


@pytest.mark.slow
def test_a_second_preparation_is_refused_and_the_first_one_finishes_unharmed(tmp_path: Path):
    """Some texts of the first one still wait in spool/ when the second one starts."""
    spawn = multiprocessing.get_context("spawn")
    reached, resume = spawn.Event(), spawn.Event()
    arguments = (golden_run(), tmp_path / "data", reached, resume)
    first = spawn.Process(target=prepare_with_a_break, args=arguments)
    first.start()
    assert reached.wait(60)
    before = contents(tmp_path)
    assert any("/spool/train-" in name for name in before)
    for force in (False, True):
        with pytest.raises(DataError, match=rf"data is being prepared already \(process {first.pid} on"):
            prepare(golden_run(), tmp_path / "data", lambda line: None, force=force)
    assert contents(tmp_path) == before
    resume.set()
    first.join(60)
    assert first.exitcode == 0 and [path.name for path in tmp_path.iterdir()] == ["data"]
    prepare(golden_run(), tmp_path / "fresh", lambda line: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_failure_before_anything_is_finished_leaves_nothing(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="1 of its 1 files are empty"):
        prepare(tiny_run([SourceConfig(name="s", paths=(str(tmp_path),))]), tmp_path / "data", lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_full_disk_is_named_and_finished_shards_are_kept(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    spool = tmp_path / "data.partial" / "spool"

    def fill(what: str, done: float, total: float | None) -> None:
        if not (spool / "validation-golden-00005.spool").is_symlink():
            (spool / "validation-golden-00005.spool").symlink_to("/dev/full")

    with pytest.raises(DataError, match="the disk is full; free some space and start again"):
        prepare(golden_run(validation_share=0.5, shard_megabytes=0.001), tmp_path / "data", lambda line: None, fill)
    assert not (tmp_path / "data").exists()


def test_few_documents_still_hold_one_out(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ["first document", "second document", "third document"])
    config = tiny_run([SourceConfig(name="s", paths=(str(path),))], validation_share=0.001)
    manifest, _, lines = prepared(config, tmp_path / "data")
    assert [record.num_documents for record in manifest.sources[0].validation] == [1]
    assert [record.num_documents for record in manifest.sources[0].train] == [2]
    assert any("the one with the smallest hash is held out" in line for line in lines)


def test_one_document_cannot_be_both_trained_on_and_held_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    source = SourceConfig(name="s", paths=(str(tmp_path / "a.txt"),))
    with pytest.raises(DataError, match=r"only one document.*text_documents: paragraphs.*validation_share: 0"):
        prepare(tiny_run([source]), tmp_path / "data", lambda line: None)
    manifest = prepare(tiny_run([source], validation_share=0.0), tmp_path / "data", lambda line: None)
    assert manifest.sources[0].validation == ()
    paragraphs = dataclasses.replace(source, text_documents="paragraphs")
    manifest = prepare(tiny_run([paragraphs]), tmp_path / "cut", lambda line: None)
    assert (manifest.sources[0].train[0].num_documents, manifest.sources[0].validation[0].num_documents) == (1, 1)


def test_all_documents_held_out_is_an_error(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(DataError, match=r"all 2 documents are held out: lower data\.validation_share"):
        prepare(
            tiny_run([SourceConfig(name="s", paths=(str(path),))], validation_share=0.999999999), tmp_path / "d", print
        )


def test_a_smaller_vocabulary_than_requested_is_reported(tmp_path: Path):
    manifest, card, lines = prepared(with_tokenizer(golden_run(), vocab_size=50_000), tmp_path / "data")
    assert manifest.tokenizer.vocab_size == card["tokenizer"]["vocab_size"] < 50_000
    assert any(
        f"{manifest.tokenizer.vocab_size} tokens instead of tokenizer.vocab_size 50000" in line for line in lines
    )
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size 50000 does not fit the training text: lower it"):
        prepare(with_tokenizer(golden_run(), kind="sentencepiece_bpe", vocab_size=50_000), tmp_path / "sp", print)


def test_two_sources_keep_their_order_and_names(tmp_path: Path):
    b = SourceConfig(name="b", paths=(str(write_jsonl(tmp_path / "b.jsonl", [f"b {n}" for n in range(20)])),))
    a = SourceConfig(name="a", paths=(str(write_jsonl(tmp_path / "a.jsonl", [f"a {n}" for n in range(20)])),))
    manifest, card, _ = prepared(tiny_run([b, a], validation_share=0.3), tmp_path / "data")
    assert [source.name for source in manifest.sources] == [source["name"] for source in card["sources"]] == ["b", "a"]
    held_out = texts_in(tmp_path / "data", "validation")
    assert held_out == sorted(held_out, key=lambda text: (text[0] == "a", int(text[2:])))
    assert card["baselines"]["num_documents"] == len(held_out)


def test_the_card_lists_what_was_skipped(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n{"body": 1}\n')
    source = SourceConfig(name="s", paths=(str(tmp_path / "a.jsonl"),), on_bad_input="skip")
    _, card, _ = prepared(tiny_run([source], validation_share=0.0), tmp_path / "data")
    read = card["sources"][0]["read"]
    assert read["bad_by_reason"] == {"no field 'text'": 1}
    assert read["bad_examples"] == {
        "no field 'text'": [f"{tmp_path / 'a.jsonl'}, line 3: no field 'text' (its fields: body)"]
    }
    assert json.dumps(card)


def test_a_link_as_data_directory_stays_a_link(tmp_path: Path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "scratch")
    prepare(golden_run(), tmp_path / "data", lambda line: None)
    prepare(golden_run(), tmp_path / "fresh", lambda line: None)
    assert (tmp_path / "data").is_symlink() and contents(tmp_path / "scratch") == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "fresh", "scratch"]
    _, _, lines = prepared(golden_run(), tmp_path / "data")
    assert "prepared already" in lines[0]
    (tmp_path / "later").symlink_to("not-there-yet")  # as before the first job of an allocation
    prepare(golden_run(), tmp_path / "later", lambda line: None)
    assert contents(tmp_path / "not-there-yet") == contents(tmp_path / "fresh")


def test_shards_without_their_manifest_are_replaced_with_force_only(tmp_path: Path):
    prepare(golden_run(), tmp_path / "data", lambda line: None)
    whole = contents(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    before = contents(tmp_path / "data")
    with pytest.raises(DataError, match=r"token shards, but no manifest\.json: copy that file too.* --force"):
        prepare(golden_run(), tmp_path / "data", lambda line: None)
    assert contents(tmp_path / "data") == before and [path.name for path in tmp_path.iterdir()] == ["data"]
    prepare(golden_run(), tmp_path / "data", lambda line: None, force=True)
    assert contents(tmp_path / "data") == whole


def test_damaged_prepared_data_is_found_and_replaced_with_force(tmp_path: Path):
    prepare(golden_run(), tmp_path / "data", lambda line: None)
    whole = contents(tmp_path / "data")
    shard = next((tmp_path / "data").glob("train-*.bin"))
    for damage in (
        lambda: os.truncate(shard, 10),
        (tmp_path / "data" / "tokenizer" / "tokenizer.json").unlink,
    ):
        damage()
        with pytest.raises(DataError, match="--force"):
            prepare(golden_run(), tmp_path / "data", lambda line: None)
        prepare(golden_run(), tmp_path / "data", lambda line: None, force=True)
        assert contents(tmp_path / "data") == whole


@pytest.mark.parametrize("moment", ["before the old one is moved", "between the two renames"])
def test_ended_while_it_publishes_the_next_start_completes_it(moment: str, tmp_path: Path):
    prepare(with_tokenizer(golden_run(), vocab_size=300), tmp_path / "data", lambda line: None)
    prepare(golden_run(), tmp_path / "new", lambda line: None)
    whole = contents(tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "data.partial")
    if moment == "between the two renames":
        (tmp_path / "data").rename(tmp_path / "data.replaced")
    else:
        shutil.rmtree(tmp_path / "data")
    _, _, lines = prepared(golden_run(), tmp_path / "data")
    assert lines == ["publishing what an earlier attempt had completed"]
    assert contents(tmp_path / "data") == whole and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_complete_folder_of_other_settings_is_not_published(tmp_path: Path):
    prepare(golden_run(), tmp_path / "fresh", lambda line: None)
    prepare(with_tokenizer(golden_run(), vocab_size=300), tmp_path / "data.partial", lambda line: None)
    prepare(golden_run(), tmp_path / "data", lambda line: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def limited(size: int, config: RunConfig, directory: Path) -> None:
    """Prepare where no file may be larger; ends with code 3 if the problem is said in words."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        prepare(config, directory, lambda line: None)
    except DataError as error:
        sys.exit(3 if "cannot be written" in str(error) or "could not be written" in str(error) else 4)


@pytest.mark.parametrize(
    "size", [0, 50, 2_000, pytest.param(9_000, marks=pytest.mark.slow), pytest.param(30_000, marks=pytest.mark.slow)]
)
def test_a_limit_on_the_size_of_files_is_said_in_words(size: int, tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(target=limited, args=(size, golden_run(), tmp_path / "data"))
    process.start()
    process.join(60)
    assert process.exitcode == 3 and not (tmp_path / "data").exists()
    assert size > 0 or list(tmp_path.iterdir()) == [], "no lock without room for its line"


def test_the_embedded_corpus_is_named(tmp_path: Path):
    lines: list[str] = []

    def stop(what: str, done: float, total: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_run(DataConfig().sources), tmp_path / "data", lines.append, stop)
    assert lines == ["the corpus is the text that every Python installation has: name your own text in data.sources"]
