"""Cutting long texts does not change their tokens, finished shards are recognised, and a killed worker is reported."""

import dataclasses
import hashlib
import multiprocessing
import multiprocessing.process
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from dsllm.config.data import TokenizerConfig
from dsllm.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from dsllm.errors import DataError
from dsllm.prepare import write_shards
from dsllm.prepare.train_tokenizer import train_tokenizer
from dsllm.prepare.units import Unit, UnitCutter
from tests.helpers.preparing import GOLDEN
from tests.helpers.tokenizer_files import END, byte_level, changed, part, prefixed, sentencepiece_model


@pytest.mark.parametrize("alphabet", ["ab\n ", "ab\n\n", "ab", "\n", "a \n\té"])
def test_the_parts_of_a_text_are_short_and_make_it_up(alphabet: str):
    text = "".join(random.Random(1).choices(alphabet, k=1000))
    parts = list(write_shards.cut(text, 50))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 50 for part in parts)


def test_a_text_cut_at_line_ends_has_the_tokens_of_the_whole():
    text = GOLDEN.read_text()[:20_000]
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=400), lambda line: None)
    whole = tokenizer.encode(text)
    assert write_shards.encode_documents(tokenizer, [text, "", "short"], limit=1000) == [
        whole,
        [],
        tokenizer.encode("short"),
    ]


def long_line_tokenizers() -> dict[str, Tokenizer]:
    """Tokenizers that treat the start of a text in all the ways there are."""
    metaspace = part(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    prefix_space = part(pre_tokenizers.ByteLevel(add_prefix_space=True))
    return {
        "byte-level": JsonTokenizer(changed(byte_level()), END, "a"),
        "prefix-space": JsonTokenizer(changed(byte_level(), pre_tokenizer=prefix_space), END, "a"),
        "llama-2": JsonTokenizer(changed(prefixed()), END, "a"),
        "metaspace": JsonTokenizer(changed(prefixed(), normalizer=None, pre_tokenizer=metaspace), END, "a"),
        "sentencepiece": SentencePieceTokenizer(sentencepiece_model("bpe"), END, "a"),
        "no-prefix": SentencePieceTokenizer(sentencepiece_model("bpe", add_dummy_prefix=False), END, "a"),
        "unigram": SentencePieceTokenizer(sentencepiece_model("unigram"), END, "a"),
    }


@pytest.mark.parametrize("kind", long_line_tokenizers())
def test_a_long_line_that_is_cut_has_the_tokens_of_the_whole(kind: str):
    """Without a space in front of each part, which a tokenizer would put in front of a text."""
    tokenizer = long_line_tokenizers()[kind]
    words = [word for word in GOLDEN.read_text()[:30_000].split() if word.isascii() and word.isalpha()]
    for text in (" ".join(words), "\n".join(words)):
        assert write_shards.encode_documents(tokenizer, [text, "a b"], limit=1000) == [
            tokenizer.encode(text),
            tokenizer.encode("a b"),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", long_line_tokenizers())
@pytest.mark.parametrize("unit", ["word ", "a", "\u2581"])
def test_a_megabyte_in_one_line_takes_time_in_proportion(kind: str, unit: str):
    tokenizer = long_line_tokenizers()[kind]
    seconds = []
    for size in (250_000, 1_000_000):
        start = time.monotonic()
        (ids,) = write_shards.encode_documents(tokenizer, [unit * (size // len(unit))], limit=100_000)
        seconds.append(time.monotonic() - start)
        assert len(ids) > 1000
    assert seconds[1] < 4 * 3 * seconds[0] + 1  # three times in proportion: the machine may be busy


def test_documents_are_batched_in_order_and_within_bounds():
    texts = ["aaaa", "bbbb", "cccc", "d" * 30, "e"]
    found = list(write_shards.batches((text.encode() for text in texts), limit=10))
    assert found == [["aaaa", "bbbb"], ["cccc"], ["d" * 30], ["e"]]


def units_and_destination(folder: Path) -> tuple[list[Unit], write_shards.Destination]:
    """Units of a few speeches each, and a tokenizer to write them with."""
    speeches = GOLDEN.read_text().split("\n\n")
    destination = write_shards.Destination(
        shards=folder, records=folder / "records", tokenizer=folder / "tokenizer", tokenizer_sha256="1"
    )
    destination.records.mkdir()
    train_tokenizer(speeches[:50], TokenizerConfig(vocab_size=300), print).save(destination.tokenizer)
    cutter = UnitCutter(folder, "s", "train", 1000)
    units = [cutter.add(text.encode(), hashlib.sha256(text.encode()).digest()) for text in speeches[:100]]
    cutter.close()
    return [unit for unit in units if unit is not None], destination


def test_a_finished_shard_is_recognised_unless_text_tokenizer_or_files_differ(tmp_path: Path):
    (unit, other, *_), destination = units_and_destination(tmp_path)
    assert write_shards.finished_record(unit, destination) is None
    record = write_shards.write_shard(unit, destination)
    assert write_shards.finished_record(unit, destination) == record
    changed = dataclasses.replace(unit, documents_sha256=other.documents_sha256)
    assert write_shards.finished_record(changed, destination) is None
    assert write_shards.finished_record(unit, dataclasses.replace(destination, tokenizer_sha256="2")) is None
    with (tmp_path / f"{unit.name}.bin").open("ab") as file:
        file.write(b"x")
    assert write_shards.finished_record(unit, destination) is None
    (destination.records / f"{unit.name}.json").write_text('{"from": "another version"}')
    assert write_shards.finished_record(unit, destination) is None


def test_a_killed_worker_is_an_error_in_words(tmp_path: Path):
    units, destination = units_and_destination(tmp_path)

    def units_until_a_worker_is_killed() -> Iterator[Unit]:
        yield units[0]
        for worker in multiprocessing.active_children():
            worker.kill()
        yield from units[1:]

    with pytest.raises(DataError, match=r"a worker process died.*lower data\.num_workers"):
        list(write_shards.write_shards(units_until_a_worker_is_killed(), destination, num_workers=2))


def damaged(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    match rng.randrange(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        case 2:
            return content[:place] + rng.randbytes(8) + content[place + 8 :]
        case 3:
            return rng.choice(
                [b"", b"null", b"[1]", b"{}", b"[" * 100_000, b'{"record": 1}', b'{"record": {}}', b"1e999"]
            )
        case 4:
            return re.sub(rb"[0-9]+", lambda match: str(int(match[0]) + (match.start() >= place)).encode(), content)
        case _:
            return content + b"x"


@pytest.mark.slow
def test_a_damaged_record_or_shard_is_written_again(tmp_path: Path):
    """Tries 200 damages of the record, of the .bin and of the .idx."""
    (unit, *_), destination = units_and_destination(tmp_path)
    text = unit.spool.read_bytes()
    record = write_shards.write_shard(unit, destination)
    whole = {
        path: path.read_bytes() for path in (destination.records / f"{unit.name}.json", *tmp_path.glob("train-*.*x"))
    }
    whole |= {path: path.read_bytes() for path in tmp_path.glob("train-*.bin")}
    assert len(whole) == 3
    rng = random.Random(11)
    for _ in range(200):
        path = rng.choice(list(whole))
        content = (
            damaged(whole[path], rng) if path.suffix != ".idx" else damaged(whole[path][:34], rng) + whole[path][34:]
        )
        path.write_bytes(content)
        found = write_shards.finished_record(unit, destination)
        assert found is None or content == whole[path]
        path.write_bytes(whole[path])
    assert write_shards.finished_record(unit, destination) == record
    for path in whole:
        path.unlink()
        assert write_shards.finished_record(unit, destination) is None
        path.mkdir()
        assert write_shards.finished_record(unit, destination) is None
        path.rmdir()
        path.write_bytes(whole[path])
    unit.spool.write_bytes(text)
    assert write_shards.write_shard(unit, destination) == record


def test_a_spool_file_that_has_changed_gives_no_shard(tmp_path: Path):
    """Tries 100 damages: each is an error in words, and no shard is there afterwards."""
    (unit, *_), destination = units_and_destination(tmp_path)
    whole, rng = unit.spool.read_bytes(), random.Random(11)
    for _ in range(100):
        content = damaged(whole, rng)
        unit.spool.write_bytes(content)
        if content == whole:
            continue
        with pytest.raises(DataError, match=r"\.spool: changed while it waited to be tokenised"):
            write_shards.write_shard(unit, destination)
        assert not list(tmp_path.glob("train-*.bin*")) and not list(destination.records.iterdir())


def test_interrupted_it_does_not_wait_for_its_workers(tmp_path: Path):
    units, destination = units_and_destination(tmp_path)
    workers: list[multiprocessing.process.BaseProcess] = []

    def interrupted() -> Iterator[Unit]:
        yield units[0]
        workers.extend(multiprocessing.active_children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(write_shards.write_shards(interrupted(), destination, num_workers=2))
    assert workers and not any(worker.is_alive() for worker in workers)
