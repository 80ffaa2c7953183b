"""Reading counts every input, and a document's split depends only on its text."""

import random
from pathlib import Path

import pytest

from dsllm.config.data import DataConfig, SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.reading import Reading, TrainingSample
from dsllm.prepare.units import Unit, spooled_documents
from tests.helpers.preparing import write_jsonl

TEXTS = [f"document number {n}" for n in range(200)]


def read(
    folder: Path, *paths: Path, sample_bytes: int = 0, source: dict | None = None, **data: object
) -> tuple[Reading, list[Unit]]:
    sources = [SourceConfig(name=f"s{n}", paths=(str(path),), **(source or {})) for n, path in enumerate(paths)]
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    reading = Reading(DataConfig(sources=tuple(sources), **data), spool, lambda *progress: None, sample_bytes)
    return reading, list(reading.units())


def texts_of(units: list[Unit], split: str) -> list[str]:
    return [content.decode() for unit in units if unit.split == split for content in spooled_documents(unit.spool)]


def test_every_input_is_counted(tmp_path: Path):
    """read = kept + duplicates + empty + bad, with the reason of each, over two sources that share documents."""
    first = write_jsonl(tmp_path / "first.jsonl", [*TEXTS[:50], "", " \n", *TEXTS[:5]])
    second = tmp_path / "second.jsonl"
    second.write_bytes(b'{"text": "new"}\n{"text": "document number 0"}\nbad\n{"text": 5}\n\n{"text": "\\ud83d"}\n{"te')
    reading, units = read(tmp_path, first, second, source={"on_bad_input": "skip"}, validation_share=0.2)
    a, b = reading.counts["s0"], reading.counts["s1"]
    assert (a.read, sum(a.kept.values()), a.duplicates, a.empty, a.bad.total()) == (57, 50, 5, 2, 0)
    assert (b.read, sum(b.kept.values()), b.duplicates, b.empty, b.bad.total()) == (7, 1, 1, 1, 4)
    assert set(b.bad) == {
        "not valid JSON",
        "field 'text' is not a string",
        "not Unicode text",
        "the file ends in the middle of a line",
    }
    assert all(examples[0].startswith(str(second)) for examples in b.bad_examples.values())
    assert sorted(texts_of(units, "train") + texts_of(units, "validation")) == sorted([*TEXTS[:50], "new"])
    for split in ("train", "validation"):
        assert sum(unit.num_documents for unit in units if unit.split == split) == a.kept[split] + b.kept[split]
        assert (
            sum(unit.text_bytes for unit in units if unit.split == split) == a.kept_bytes[split] + b.kept_bytes[split]
        )


def test_a_bad_input_is_an_error_with_its_place_and_what_to_do(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    path.write_bytes(path.read_bytes() + b"{bad\n")
    with pytest.raises(DataError, match=r"source 's0': .*a\.jsonl, line 4: not valid JSON .*on_bad_input: skip"):
        read(tmp_path, path)


def test_a_link_to_nowhere_is_a_bad_input(tmp_path: Path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.txt").symlink_to(tmp_path / "gone.txt")
    write_jsonl(tmp_path / "web" / "b.jsonl", TEXTS[:2])
    reading, _ = read(tmp_path, tmp_path / "web", source={"on_bad_input": "skip"}, validation_share=0)
    assert reading.counts["s0"].bad == {"cannot be opened": 1}
    assert sum(reading.counts["s0"].kept.values()) == 2


def test_files_without_content_are_remarks_and_no_inputs(tmp_path: Path):
    """A job that had no rows for a part leaves an empty file, and an empty file named _SUCCESS."""
    (tmp_path / "parts").mkdir()
    write_jsonl(tmp_path / "parts" / "part-0.jsonl", TEXTS[:2])
    for name in ("_SUCCESS", "part-1.jsonl", "part-2.parquet", *(f"part-{n}.txt" for n in range(3, 10))):
        (tmp_path / "parts" / name).touch()
    reading, _ = read(tmp_path, tmp_path / "parts", validation_share=0)
    count = reading.counts["s0"]
    assert (count.read, count.num_files, count.kept["train"]) == (2, 10, 2)
    assert dict(count.remarks) == {"empty file, passed over": 9} and dict(count.ignored_files) == {"_SUCCESS": 1}
    examples = count.remark_examples["empty file, passed over"]
    assert len(examples) == 5 and examples[0] == (f"{tmp_path}/parts/part-1.jsonl")


def test_a_source_of_empty_files_only_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"yields no document: 0 read, of .*; 1 of its 1 files are empty"):
        read(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"\n\n", b'{"text": ""}\n'])
def test_a_source_without_a_document_is_an_error(content: bytes, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(
        DataError, match=r"source 's0' yields no document: . read, of which 0 duplicates, . empty, 0 bad"
    ):
        read(tmp_path, tmp_path / "a.jsonl")


def test_duplicates_are_kept_on_request_and_go_to_one_split(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 2)
    reading, units = read(tmp_path, path, deduplicate=False, validation_share=0.3)
    assert reading.counts["s0"].duplicates == 0 and reading.counts["s0"].read == 400
    assert not set(texts_of(units, "train")) & set(texts_of(units, "validation"))


def test_a_document_stays_in_its_split_when_others_are_added(tmp_path: Path):
    few, many = write_jsonl(tmp_path / "a.jsonl", TEXTS[:50]), write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    held_out = set(texts_of(read(tmp_path, few, validation_share=0.2)[1], "validation"))
    held_out_of_more = set(texts_of(read(tmp_path, many, validation_share=0.2)[1], "validation"))
    assert held_out == held_out_of_more & set(TEXTS[:50])
    # 200 documents at 0.2: 40 expected, standard deviation 5.7; within four of them
    assert 17 <= len(held_out_of_more) <= 63


def test_the_document_with_the_smallest_hash_can_be_held_out(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    reading, units = read(tmp_path, path, validation_share=1e-9)
    assert not texts_of(units, "validation")
    held_out = texts_of(list(reading.hold_out_one().units()), "validation")
    assert len(held_out) == 1
    assert held_out[0] in texts_of(read(tmp_path, path, validation_share=0.3)[1], "validation")


def test_reading_stops_at_max_megabytes_and_says_so(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 400 + str(n) for n in range(10)])
    reading, _ = read(tmp_path, path, source={"max_megabytes": 0.001})
    count = reading.counts["s0"]
    assert (count.read, count.total_bytes, count.cut_at_megabytes) == (2, 802, 0.001)
    assert read(tmp_path, path, source={"max_megabytes": 1})[0].counts["s0"].cut_at_megabytes is None
    with pytest.raises(DataError, match="first document is larger than max_megabytes"):
        read(tmp_path, path, source={"max_megabytes": 0.0001})


def test_units_hold_the_documents_in_order_and_are_cut_by_size(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    _, units = read(tmp_path, path, validation_share=0, shard_megabytes=0.001)
    assert texts_of(units, "train") == TEXTS
    assert [unit.name for unit in units] == [f"train-s0-{n:05d}" for n in range(len(units))]
    assert all(1000 <= unit.text_bytes < 1000 + max(map(len, TEXTS)) for unit in units[:-1])
    again = read(tmp_path, write_jsonl(tmp_path / "b.jsonl", TEXTS[:-1]), validation_share=0, shard_megabytes=0.001)[1]
    same = [a.documents_sha256 == b.documents_sha256 for a, b in zip(units, again, strict=True)]
    assert same == [True] * (len(units) - 1) + [False]


def test_the_sample_is_even_within_its_budget_and_independent_of_order(tmp_path: Path):
    generator = random.Random(1)
    documents = [(generator.getrandbits(64), f"{n:010d}".encode()) for n in range(1000)]
    samples = []
    for order in (documents, documents[::-1]):
        sample = TrainingSample(500)
        for place, content in order:
            sample.offer(place, content)
        samples.append(sample)
    assert samples[0].num_bytes == 500
    assert list(samples[0].texts()) == [content.decode() for _, content in sorted(documents)[:50]]
    assert samples[0].sha256() == samples[1].sha256()


def test_the_tokenizer_sees_no_held_out_document(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    reading, units = read(tmp_path, path, sample_bytes=10**6, validation_share=0.3)
    assert sorted(reading.sample.texts()) == sorted(texts_of(units, "train"))
